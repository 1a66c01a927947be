// What the forward and the backward of attention share: tiles of scores, and what stands between query key^T and the
// logits (formulas: ops/attention.h).
//
//   A tile holds up to kKeys keys x kRows query rows as floats, a key's rows side by side ("transposed"):
//
//               rows ->            lane = query row: maxima, sums and exponentials of a row are plain vector
//     keys   [ . . . . . . ]       operations, no reduction across lanes, and the keys are a product's left
//       |    [ . . . . . . ]       operand as they lie; only query is transposed, once for all keys.
//       v    [ . . . . . . ]
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dropout.h"
#include "cpu/tile_gemm.h"
#include "cpu/vec_math.h"
#include "ops/attention.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// Multiples of kTileRows, kPanel, kLanes and of the 4 columns of a dropout counter.
inline constexpr int64_t kRows = 96, kKeys = 96, kTile = kRows * kKeys;

constexpr int64_t count_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t padded(int64_t columns) { return round_up(columns, kLanes); }

// ---- operands -------------------------------------------------------------------------------------------------------

// The rows of one head of a (batch, heads, rows, columns) tensor, from row `first` on.
template <class T>
struct Rows {
  T* data;
  int64_t stride, columns;

  Rows(const TensorView& t, int64_t batch, int64_t head, int64_t first)
      : data(t.as<T>() + batch * t.stride(0) + head * t.stride(1) + first * t.stride(2)),
        stride(t.stride(2)),
        columns(t.size(3)) {}
  T* row(int64_t r) const { return data + r * stride; }
};

// Rows of floats, `stride` apart and multiplied by `factor`, to a tensor.
template <class T>
void store_rows(const float* from, int64_t stride, int64_t count, float factor, const Rows<T>& to) {
  for (int64_t r = 0; r < count; ++r) {
    for_lanes(to.columns, [&](int64_t c, auto n) { store_n(to.row(r) + c, load(from + r * stride + c) * factor, n); });
  }
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// The rows [row, row + rows) and keys [key, key + keys) of a sequence, both counted from 0 within the tile below. Where
// a band hides part of the tile, only those vectors of scores are made whose stripe of keys (which a product makes at
// once) some row of the vector sees. A stripe of rows (which products read at once) may straddle two vectors: what one
// is made for includes therefore what its neighbours' nearest rows see.
struct TilePlace {
  int64_t row, rows, key, keys;  // key is a multiple of 4
  int64_t stripe;                // of keys
  const ops::Band* band;         // null: all vectors are made

  TilePlace(int64_t row, int64_t rows, int64_t key, int64_t keys, int64_t stripe, const ops::Band* band)
      : row(row), rows(rows), key(key), keys(keys), stripe(stripe), band(band) {
    constexpr int64_t kNearest = kTileRows - 1;
    for (int64_t v = 0; v < vectors(); ++v) {
      const Span seen = keys_seen(v * kLanes - kNearest, kLanes + 2 * kNearest);
      made_[v] = {seen.begin / stripe * stripe, std::min(keys, round_up(seen.end, stripe))};
      if (seen.count() <= 0) made_[v] = {keys, keys};
    }
  }

  int64_t vectors() const { return count_of(rows, kLanes); }

  // The keys that any of rows [r, r + count) sees.
  Span keys_seen(int64_t r, int64_t count) const {
    if (!band) return {0, keys};
    const int64_t first = row + std::max<int64_t>(r, 0), last = row + std::min(r + count, rows) - 1;
    return {ops::clamp_index(band->begin(first) - key, 0, keys), ops::clamp_index(band->end(last) - key, 0, keys)};
  }
  // The keys for which a vector is made, and the vectors that are made for a stripe of keys.
  Span keys_of(int64_t vector) const { return made_[vector]; }
  Span vectors_of(int64_t stripe_key) const {
    Span found{0, vectors()};
    while (found.begin < found.end && !is_made(found.begin, stripe_key)) ++found.begin;
    while (found.begin < found.end && !is_made(found.end - 1, stripe_key)) --found.end;
    return found;
  }

 private:
  bool is_made(int64_t v, int64_t key) const { return made_[v].begin <= key && key < made_[v].end; }

  Span made_[kRows / kLanes];
};

// Calls body(vector, key, score) for the vectors of scores that are made of a tile.
template <class Body>
inline void for_scores(const TilePlace& at, float* tile, const Body& body) {
  for_stripes(at.keys, at.stripe, [&](int64_t stripe, int count) {
    const Span vectors = at.vectors_of(stripe);
    for (int64_t c = stripe; c < stripe + count; ++c) {
      for (int64_t v = vectors.begin; v < vectors.end; ++v) body(v, c, tile + c * kRows + v * kLanes);
    }
  });
}

// The scores of a tile at one distance lie on a diagonal: number index(c, r) of the diagonals for its key c and row r.
// A vector of scores, whose lanes are rows side by side, meets as many diagonals side by side.
class Diagonals {
 public:
  static constexpr int64_t kCount = kRows + kKeys;  // the last is of no score
  static constexpr int64_t index(int64_t c, int64_t r) { return kKeys - 1 - c + r; }

  // Their table has an entry for each of the distances -farthest ... farthest, and ends that stand for all beyond.
  Diagonals(const TilePlace& at, const ops::Band& band, int64_t farthest)
      : at_(at), first_(at.key + kKeys - 1 - (at.row + band.shift)), farthest_(farthest) {}

  // line[d] = the entry of diagonal d
  void read(const float* table, float* line) const {
    for (int64_t d = 0; d < kCount; ++d) line[d] = table[entry(d)];
  }
  // Adds sums of the diagonals to a table that begins at entry `first`. The many that share an end are summed first.
  void add(const float* sums, float* table, int64_t first) const {
    const int64_t end = index(0, at_.rows);
    for (int64_t d = index(at_.keys - 1, 0); d < end;) {
      const int64_t m = entry(d);
      float total = 0.0f;
      for (; d < end && entry(d) == m; ++d) total += sums[d];
      table[m - first] += total;
    }
  }
  // line[d] = the sum of the scores on diagonal d. Vectors that meet the same diagonals, one in each block of keys, are
  // added in a register, and the line is updated once for all of them.
  void sum(const float* tile, float* line) const {
    const int64_t vectors = at_.vectors(), blocks = count_of(at_.keys, kLanes);
    Span made[kRows / kLanes];
    for (int64_t v = 0; v < vectors; ++v) made[v] = at_.keys_of(v);
    std::fill_n(line, kCount, 0.0f);
    for (int64_t key = 0; key < kLanes; ++key) {
      for (int64_t diagonal = 1 - blocks; diagonal < vectors; ++diagonal) {
        F total = {};
        const int64_t end = std::min(vectors, blocks + diagonal);
        for (int64_t v = std::max<int64_t>(0, diagonal); v < end; ++v) {
          const int64_t c = (v - diagonal) * kLanes + key;
          if (c >= made[v].begin && c < made[v].end) total += load(tile + c * kRows + v * kLanes);
        }
        float* sums = line + index(key, diagonal * kLanes);
        store(sums, load(sums) + total);
      }
    }
  }

 private:
  // Diagonal d has distance first_ - d.
  int64_t entry(int64_t d) const { return ops::clamp_index(first_ - d, -farthest_, farthest_) + farthest_; }

  TilePlace at_;
  int64_t first_, farthest_;
};

// What a mask adds to a logit.
inline float bias_of(float x) { return x; }
inline float bias_of(bf16 x) { return widen(x); }
inline float bias_of(uint8_t seen) { return seen ? 0.0f : -INFINITY; }

// A key whose bias is -inf is not seen, whatever its score: NaN in padding stays there.
inline F biased(F score, F bias) { return select(bias == -INFINITY, bias, score + bias); }

// The part of the mask that one head of a sequence meets; of size 1 it stays where it is, at steps of 0.
class MaskOfHead {
 public:
  int64_t row_step = 0, key_step = 0;

  MaskOfHead(const ops::AttentionOptions& p, const ops::Sequence& s, int64_t head) : mask_(p.mask) {
    if (!defined()) return;
    row_step = step(2), key_step = step(3);
    offset_ = step(0) * s.batch + step(1) * head;
  }

  bool defined() const { return mask_.defined(); }
  bool boolean() const { return defined() && mask_.dtype == DType::boolean; }

  // body(its elements from (row, key) on)
  template <class Body>
  auto visit(int64_t row, int64_t key, const Body& body) const {
    const int64_t offset = offset_ + row * row_step + key * key_step;
    switch (mask_.dtype) {
      case DType::f32: return body(mask_.as<float>() + offset);
      case DType::bf16: return body(mask_.as<bf16>() + offset);
      default: return body(mask_.as<uint8_t>() + offset);
    }
  }

  // From the first to the last of so many keys that it lets some row see, where it is the same for all rows: padding
  // takes no time.
  Span seen(int64_t keys) const {
    Span some{0, keys};
    if (!defined() || row_step) return some;
    return visit(0, 0, [&](const auto* mask) {
      const auto hidden = [&](int64_t first, int64_t count) {
        bool all = true;
        for (int64_t k = first; k < first + count; ++k) all &= bias_of(mask[k]) == -INFINITY;
        return all;
      };
      if (key_step == 0) return keys && hidden(0, 1) ? Span{0, 0} : some;
      for (int64_t count : {16, 1}) {
        while (some.count() >= count && hidden(some.begin, count)) some.begin += count;
        while (some.count() >= count && hidden(some.end - count, count)) some.end -= count;
      }
      return some;
    });
  }

 private:
  int64_t step(int dim) const { return mask_.size(dim) == 1 ? 0 : mask_.stride(dim); }

  const TensorView& mask_;
  int64_t offset_ = 0;
};

// One head of one sequence.
class Scores {
 public:
  Scores(const ops::AttentionOptions& p, const ops::Sequence& s, int64_t head)
      : p_(p),
        band_(p.band(s)),
        index_(s.index),
        head_(head),
        mask_(p, s, head),
        seen_(mask_.seen(s.keys)),
        stream_(static_cast<uint32_t>(s.index * p.heads() + head)),
        dropout_(p.dropout_p, p.seed) {}

  // From the first to the last key that rows [row, row_end) may see.
  Span keys(int64_t row, int64_t row_end) const { return common(seen_, {band_.begin(row), band_.end(row_end - 1)}); }
  TilePlace place(int64_t row, int64_t rows, int64_t key, int64_t keys, int64_t stripe) const {
    return {row, rows, key, keys, stripe, band_.covers(row, row + rows, key, key + keys) ? nullptr : &band_};
  }

  bool capped() const { return p_.softcap > 0; }
  bool drops() const { return dropout_.active; }

  // Products become logits. `slope`: receives the soft cap's derivative, where it is wanted and there is a cap.
  void to_logits(const TilePlace& at, float* tile, float* slope = nullptr) const {
    if (capped()) cap(at, tile, slope);
    if (p_.alibi_slopes.defined()) add_alibi(at, tile);
    if (p_.distance_bias.defined()) add_distance_bias(at, tile);
    if (mask_.defined()) add_mask(at, tile);
    if (at.band) apply_band(at, tile);
  }

  // keep / (1 - dropout_p), of the vectors that are made and of neighbours
  void keep_multipliers(const TilePlace& at, float* keep) const {
    for (int64_t r = 0; r < at.rows; r += Dropout::kBlockRows) {
      Span keys{at.keys, 0};
      for (int64_t v = r / kLanes; v < std::min((r + Dropout::kBlockRows) / kLanes, at.vectors()); ++v) {
        keys = {std::min(keys.begin, at.keys_of(v).begin), std::max(keys.end, at.keys_of(v).end)};
      }
      for (int64_t c = keys.begin / Dropout::kBlockColumns * Dropout::kBlockColumns; c < keys.end;
           c += Dropout::kBlockColumns) {
        dropout_.draw_across(stream_, at.row + r, at.key + c, [&](int64_t j, int64_t i, I dropped) {
          store(keep + (c + j) * kRows + r + i, select(dropped, F{}, broadcast(dropout_.keep_scale)));
        });
      }
    }
  }

 private:
  void cap(const TilePlace& at, float* tile, float* slope) const {
    const float cap = static_cast<float>(p_.softcap), inverse = static_cast<float>(1.0 / p_.softcap);
    for_scores(at, tile, [&](int64_t, int64_t, float* x) {
      const F t = tanh(load(x) * inverse);
      store(x, t * cap);
      if (slope) store(slope + (x - tile), 1.0f - t * t);
    });
  }

  // position(row) - first key of the tile, in each lane
  I position(const TilePlace& at, int64_t v) const {
    I lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<int32_t>(at.row + v * kLanes + i + band_.shift - at.key);
    return lanes;
  }

  void add_alibi(const TilePlace& at, float* tile) const {
    const float slope =
        p_.alibi_slopes.as<float>()[index_ * p_.alibi_slopes.stride(0) + head_ * p_.alibi_slopes.stride(1)];
    F positions[kRows / kLanes];
    for (int64_t v = 0; v < at.vectors(); ++v) positions[v] = to_float(position(at, v));
    for_scores(at, tile, [&](int64_t v, int64_t c, float* x) {
      const F distance = positions[v] - static_cast<float>(c);
      store(x, load(x) - slope * max(distance, -distance));
    });
  }

  void add_distance_bias(const TilePlace& at, float* tile) const {
    float line[Diagonals::kCount];
    Diagonals(at, band_, p_.farthest()).read(p_.distance_bias.as<float>() + head_ * p_.distance_bias.size(1), line);
    for_scores(at, tile, [&](int64_t v, int64_t c, float* x) {
      store(x, biased(load(x), load(line + Diagonals::index(c, v * kLanes))));
    });
  }

  void apply_band(const TilePlace& at, float* tile) const {
    I begin[kRows / kLanes] = {}, end[kRows / kLanes] = {};  // of the tile's keys; rows beyond the last see none
    for (int64_t r = 0; r < at.rows; ++r) {
      const int64_t first = band_.begin(at.row + r) - at.key, last = band_.end(at.row + r) - at.key;
      begin[r / kLanes][r % kLanes] = static_cast<int32_t>(ops::clamp_index(first, 0, at.keys));
      end[r / kLanes][r % kLanes] = static_cast<int32_t>(ops::clamp_index(last, 0, at.keys));
    }
    for_scores(at, tile, [&](int64_t v, int64_t c, float* x) {
      const int32_t key = static_cast<int32_t>(c);
      store(x, select((begin[v] <= key) & (end[v] > key), load(x), broadcast(-INFINITY)));
    });
  }

  void add_mask(const TilePlace& at, float* tile) const {
    mask_.visit(at.row, at.key, [&](const auto* mask) { add_mask(at, mask, tile); });
  }

  template <class T>
  void add_mask(const TilePlace& at, const T* mask, float* tile) const {
    const int64_t row_step = mask_.row_step, key_step = mask_.key_step;
    float line[kLanes][kKeys] = {};
    if (row_step == 0) {
      read_mask(mask, key_step, at.keys, line[0]);
      for_scores(at, tile, [&](int64_t, int64_t c, float* x) { store(x, biased(load(x), broadcast(line[0][c]))); });
      return;
    }
    for (int64_t r = 0; r < at.rows; r += kLanes) {
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, at.rows - r); ++i) {
        read_mask(mask + (r + i) * row_step, key_step, at.keys, line[i]);
      }
      for (int64_t c = 0; c < at.keys; c += kLanes) {
        F block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(line[i] + c);
        transpose(block);
        for (int i = 0; i < kLanes; ++i) {
          float* x = tile + (c + i) * kRows + r;
          store(x, biased(load(x), block[i]));
        }
      }
    }
  }

  template <class T>
  static void read_mask(const T* mask, int64_t step, int64_t keys, float* line) {
    if (step == 0) {
      std::fill_n(line, keys, bias_of(*mask));
    } else {
      for (int64_t c = 0; c < keys; ++c) line[c] = bias_of(mask[c]);
    }
  }

  const ops::AttentionOptions& p_;
  ops::Band band_;
  int64_t index_, head_;
  MaskOfHead mask_;
  Span seen_;
  uint32_t stream_;
  Dropout dropout_;
};

// ---- tasks ----------------------------------------------------------------------------------------------------------

// Numbers the tasks of all sequences from 0 on, sequence after sequence.
class SequenceTasks {
 public:
  // count(s): the tasks of sequence s
  template <class Count>
  SequenceTasks(std::vector<ops::Sequence> sequences, const Count& count) : sequences_(std::move(sequences)) {
    for (size_t s = 0; s < sequences_.size(); ++s) first_.push_back(first_.back() + count(s));
  }
  int64_t size() const { return first_.back(); }
  struct Task {
    const ops::Sequence& sequence;
    size_t which;    // of the sequences
    int64_t number;  // within the sequence
  };
  Task operator[](int64_t index) const {
    const size_t s = static_cast<size_t>(std::upper_bound(first_.begin(), first_.end(), index) - first_.begin()) - 1;
    return {sequences_[s], s, index - first_[s]};
  }

 private:
  std::vector<ops::Sequence> sequences_;
  std::vector<int64_t> first_{0};
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
