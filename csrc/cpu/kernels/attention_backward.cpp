// Attention, backward: probabilities are made again from lse, tile by tile (formulas: ops/attention.h, tiles:
// cpu/attention_tile.h).
//
//   A task owns one key head of one sequence, whose grad_key and grad_value it accumulates in floats, and goes through
//   the row tiles of the query heads that share it, up to kTogether at once. Of each it packs query and grad_output, as
//   they lie and transposed, and accumulates grad_query against every tile of kKeys keys that the rows see:
//
//     P = exp(logits(key query^T) - lse)                10 kRows kKeys head_dim flops
//     G = P (value grad_output^T keep - delta) cap'     about 30 instructions a vector of scores
//     grad_value += (P keep) grad_output,  grad_key += G query,  grad_query += G^T key
//
//   What no row of a vector sees is left out, as in the forward. Of bf16 tensors, where pairs pay, P and G are rounded
//   to bf16 for the last three products.
//
//   Where there are few key heads for many processors, the row tiles are dealt out to several tasks, each with
//   accumulators of its own, which are added in a fixed order: how many is a matter of the shapes, never of the number
//   of threads, so that this changes no bit. Limit: the multiply-add ports.
//
//   The gradient of a mask is made by tasks of its own, each owning a tile of it and going through all batch entries,
//   heads or rows that share the tile: two products more where it is asked for, and no quadratic buffer. A bias that is
//   one for all keys of a row moves lse and, where there is a sink, what it leaves to them: that takes no scores.
//
//   The gradient of a bias by distance is made of the tiles G as they pass: their sums along the diagonals, an addition
//   a score, go to a table that the task has for each of its heads, no longer than the sequence has distances. These
//   tables, too, are added in a fixed order; so is what each tile of rows gives to the gradient of its head's sink.
#include <numeric>

#include "cpu/attention_amx_backward.h"
#include "cpu/attention_rows.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

// ---- grad_distance_bias ---------------------------------------------------------------------------------------------

// Of each sequence and head, a table for each share of its rows (Backward::shares) of the entries that its distances
// reach.
class DistanceSums {
 public:
  DistanceSums(const ops::AttentionBackward& p, const std::vector<ops::Sequence>& sequences,
               const std::vector<int64_t>& shares)
      : p_(p) {
    if (!wanted()) return;
    int64_t total = 0;
    for (size_t n = 0; n < sequences.size(); ++n) {
      const ops::Sequence& s = sequences[n];
      const int64_t shift = p.band(s).shift, most = p.farthest();
      const int64_t first = ops::clamp_index(1 - s.rows - shift, -most, most) + most;
      const int64_t end = ops::clamp_index(s.keys - 1 - shift, -most, most) + most + 1;
      tables_.push_back({total, first, s.rows && s.keys ? end - first : 0, shares[n]});
      total += tables_.back().entries * p.heads() * shares[n];
    }
    sums_ = std::make_unique<float[]>(static_cast<size_t>(total));
  }

  bool wanted() const { return p_.grad_distance_bias.defined(); }

  // Adds a tile of gradients of the logits.
  void add(const SequenceTasks::Task& task, int64_t head, int64_t share, const TilePlace& at, const float* tile) const {
    float line[Diagonals::kCount];
    const Diagonals diagonals(at, p_.band(task.sequence), p_.farthest());
    diagonals.sum(tile, line);
    diagonals.add(line, table(tables_[task.which], head, share), tables_[task.which].first);
  }

  void write() const {
    const int64_t entries = p_.distance_bias.size(1);
    parallel_each(p_.heads(), [&](int64_t head) {
      float* out = p_.grad_distance_bias.as<float>() + head * entries;
      std::fill_n(out, entries, 0.0f);
      for (const Tables& t : tables_) {
        for (int64_t share = 0; share < t.shares; ++share) {
          const float* from = table(t, head, share);
          for (int64_t m = 0; m < t.entries; ++m) out[t.first + m] += from[m];
        }
      }
    });
  }

 private:
  struct Tables {
    int64_t offset, first, entries, shares;
  };
  float* table(const Tables& t, int64_t head, int64_t share) const {
    return sums_.get() + t.offset + (head * t.shares + share) * t.entries;
  }

  const ops::AttentionBackward& p_;
  std::vector<Tables> tables_;
  std::unique_ptr<float[]> sums_;
};

// ---- grad_sinks -----------------------------------------------------------------------------------------------------

// Of each sequence and head, a number for each tile of rows.
class SinkSums {
 public:
  SinkSums(const ops::AttentionBackward& p, const std::vector<ops::Sequence>& sequences) : p_(p) {
    if (!wanted()) return;
    for (const ops::Sequence& s : sequences) first_.push_back(first_.back() + p.heads() * count_of(s.rows, kRows));
    sums_ = std::make_unique<double[]>(static_cast<size_t>(first_.back()));
  }

  bool wanted() const { return p_.grad_sinks.defined(); }

  template <class RowTile>
  void set(const SequenceTasks::Task& at, const RowTile& rows) const {
    sums_[first_[at.which] + rows.head() * count_of(at.sequence.rows, kRows) + rows.row() / kRows] = rows.grad_sink();
  }

  void write() const {
    for (int64_t head = 0; head < p_.heads(); ++head) {
      double total = 0.0;
      for (size_t s = 0; s + 1 < first_.size(); ++s) {
        const int64_t tiles = (first_[s + 1] - first_[s]) / p_.heads();
        const double* sums = sums_.get() + first_[s] + head * tiles;
        total = std::accumulate(sums, sums + tiles, total);
      }
      p_.grad_sinks.as<float>()[head] = static_cast<float>(total);
    }
  }

 private:
  const ops::AttentionBackward& p_;
  std::vector<int64_t> first_{0};
  std::unique_ptr<double[]> sums_;
};

// ---- grad_query, grad_key, grad_value -------------------------------------------------------------------------------

constexpr int64_t kTasks = 16;  // about so many of equal work, where there is so much, and no more heads

class Backward {
 public:
  explicit Backward(const ops::AttentionBackward& p)
      : p_(p),
        depth_(padded(p.query.size(3))),
        width_(padded(p.value.size(3))),
        tiled_(tiles(p)),
        value_factor_(tiled_ ? Dropout(p.dropout_p, p.seed).keep_scale : 1.0f),
        sequences_(ops::sequences_of(p)),
        shares_(shares()),
        distances_(p, sequences_, shares_),
        sinks_(p, sequences_),
        tasks_(sequences_, [&](size_t s) { return p.key_heads() * shares_[s]; }) {
    for (size_t s = 0; s < sequences_.size(); ++s) {
      const int64_t partials = shares_[s] > 1 ? p.key_heads() * shares_[s] : 0;
      first_partial_.push_back(first_partial_.back() + partials * floats(sequences_[s]));
    }
    take_partials(first_partial_.back());
  }

  template <class T>
  void run() const {
    parallel_each(tasks_.size(), [&](int64_t index) { task<T>(tasks_[index]); });
    const SequenceTasks sums(sequences_, [&](size_t s) {
      return shares_[s] > 1 ? p_.key_heads() * count_of(sequences_[s].keys, kKeys) : 0;
    });
    parallel_each(sums.size(), [&](int64_t index) { add_partials<T>(sums[index]); });
    if (distances_.wanted()) distances_.write();
    if (sinks_.wanted()) sinks_.write();
  }

 private:
  // Among how many tasks the row tiles of a key head are shared out, for each sequence.
  std::vector<int64_t> shares() const {
    int64_t total = 0;
    for (const ops::Sequence& s : sequences_) total += p_.key_heads() * s.rows * s.keys;
    std::vector<int64_t> shares;
    for (const ops::Sequence& s : sequences_) {
      const int64_t wanted = total ? (kTasks * s.rows * s.keys + total / 2) / total : 1;
      shares.push_back(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, row_tiles(s))));
    }
    return shares;
  }

  // Kept between calls, where they are few: their fresh pages would cost as much as the products.
  void take_partials(int64_t floats) {
    constexpr int64_t kKept = int64_t{1} << 24;
    thread_local Scratch kept;
    if (floats <= kKept) {
      partials_ = kept.take(floats)[0];
    } else {
      fresh_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(floats));
      partials_ = fresh_.get();
    }
  }

  // Accumulators of a key head: grad_key (keys, depth_), then grad_value (keys, width_).
  int64_t floats(const ops::Sequence& s) const { return s.keys * (depth_ + width_); }
  float* partial(const SequenceTasks::Task& at, int64_t key_head, int64_t share) const {
    return partials_ + first_partial_[at.which] + (key_head * shares_[at.which] + share) * floats(at.sequence);
  }

  template <class T>
  void task(const SequenceTasks::Task& at) const {
    const ops::Sequence& s = at.sequence;
    const int64_t shares = shares_[at.which], key_head = at.number / shares, share = at.number % shares;
    thread_local Scratch accumulators;
    float* grad_key = shares > 1 ? partial(at, key_head, share) : accumulators.take(floats(s))[0];
    float* grad_value = grad_key + s.keys * depth_;
    std::fill_n(grad_key, floats(s), 0.0f);
    [[maybe_unused]] const typename Products<T>::Session session;
    if (tiled_) {
      tile_rows(at, key_head, share, grad_key, grad_value);
    } else {
      add_rows<T>(at, key_head, share, grad_key, grad_value);
    }
    if (shares == 1) write(grad_key, grad_value, s, key_head, 0, s.keys, T{});
  }

  // What a share of the rows gives to their keys.
  template <class T>
  void add_rows(const SequenceTasks::Task& at, int64_t key_head, int64_t share, float* grad_key,
                float* grad_value) const {
    using RowTile = BackwardRows<T, ops::AttentionBackward, Scores>;
    const ops::Sequence& s = at.sequence;
    const RowTiles places(p_, s);
    const int64_t shares = shares_[at.which], together = tiles_together(RowTile::floats(p_));
    using Keys = KeyTiles<T, ops::AttentionBackward>;
    thread_local Scratch scratch;
    const auto [keys, memory, scores] =
        scratch.take(Keys::floats(p_), RowTile::floats(p_) * together, TileBuffers<T>::kFloats);
    const Keys key_tiles(p_, s, key_head, keys);
    const TileBuffers<T> tiles(scores);
    std::vector<RowTile> all;
    all.reserve(static_cast<size_t>(together));
    for (int64_t n = share; n < places.count();) {
      all.clear();
      for (float* own = memory; n < places.count() && std::ssize(all) < together; n += shares) {
        const int64_t head = places.head(n, key_head);
        all.emplace_back(p_, s, head, places.row(n), Scores(p_, s, head), own);
        own += RowTile::floats(p_);
      }
      const auto make = [&](int64_t first) { return key_tiles.backward(first); };
      for_key_tiles(s.keys, all, make, [&](RowTile& rows, const KeyTile<T>& tile) {
        const TilePlace place = rows.make_tiles(tile, tiles);
        if (distances_.wanted()) distances_.add(at, rows.head(), share, place, tiles.g);
        rows.accumulate(place, tile, tiles, grad_key, grad_value);
      });
      for (const RowTile& rows : all) {
        rows.write();
        if (sinks_.wanted()) sinks_.set(at, rows);
      }
    }
  }

#if defined(LLMENGINE_AMX)
  static bool tiles(const ops::AttentionBackward& p) { return amx_takes(p) && !p.grad_distance_bias.defined(); }
  int64_t row_tiles(const ops::Sequence& s) const {
    return tiled_ ? p_.group() * count_of(s.rows, AmxBackward<1>::kBlockRows) : RowTiles(p_, s).count();
  }
  void tile_rows(const SequenceTasks::Task& at, int64_t key_head, int64_t share, float* grad_key,
                 float* grad_value) const {
    const auto tile = [&]<int steps>(std::integral_constant<int, steps>) {
      AmxBackward<steps> all(p_, at.sequence, key_head);
      const int64_t group = p_.group(), blocks = row_tiles(at.sequence) / group;
      for (int64_t n = share; n < blocks * group; n += shares_[at.which]) {
        all.add_rows(key_head * group + n % group, (blocks - 1 - n / group) * all.kBlockRows, grad_key, grad_value);
        if (sinks_.wanted()) sinks_.set(at, all);
      }
    };
    amx_steps(p_, tile);
  }
#else
  static bool tiles(const ops::AttentionBackward&) { return false; }
  int64_t row_tiles(const ops::Sequence& s) const { return RowTiles(p_, s).count(); }
  void tile_rows(const SequenceTasks::Task&, int64_t, int64_t, float*, float*) const {}
#endif

  // keys [first, first + count) of a key head, from accumulators that begin there
  template <class T>
  void write(const float* grad_key, const float* grad_value, const ops::Sequence& s, int64_t key_head, int64_t first,
             int64_t count, T) const {
    const int64_t key = s.key0 + first;
    store_rows(grad_key, depth_, count, static_cast<float>(p_.scale), Rows<T>(p_.grad_key, s.batch, key_head, key));
    store_rows(grad_value, width_, count, value_factor_, Rows<T>(p_.grad_value, s.batch, key_head, key));
  }

  template <class T>
  void add_partials(const SequenceTasks::Task& at) const {
    const ops::Sequence& s = at.sequence;
    const int64_t tiles = count_of(s.keys, kKeys), key_head = at.number / tiles;
    const int64_t first = at.number % tiles * kKeys, count = std::min(kKeys, s.keys - first);
    const auto add = [&](int64_t offset, int64_t floats) {
      float* into = partial(at, key_head, 0) + offset;
      for (int64_t share = 1; share < shares_[at.which]; ++share) {
        const float* from = partial(at, key_head, share) + offset;
        for (int64_t i = 0; i < floats; ++i) into[i] += from[i];
      }
      return into;
    };
    const float* grad_key = add(first * depth_, count * depth_);
    const float* grad_value = add(s.keys * depth_ + first * width_, count * width_);
    write(grad_key, grad_value, s, key_head, first, count, T{});
  }

  const ops::AttentionBackward& p_;
  int64_t depth_, width_;
  bool tiled_;  // by cpu/attention_amx_backward.h
  float value_factor_;
  std::vector<ops::Sequence> sequences_;
  std::vector<int64_t> shares_;
  DistanceSums distances_;
  SinkSums sinks_;
  SequenceTasks tasks_;
  std::vector<int64_t> first_partial_{0};
  std::unique_ptr<float[]> fresh_;
  float* partials_ = nullptr;
};

// ---- grad_mask ------------------------------------------------------------------------------------------------------

// The positions along one dimension that share index i of the mask: i alone, or all where the mask has size 1.
struct Shared {
  int64_t size, full;
  int64_t first(int64_t i) const { return size == 1 ? 0 : i; }
  int64_t last(int64_t i, int64_t step = 1) const { return size == 1 ? full : std::min(full, i + step); }
};

class MaskGradient {
 public:
  explicit MaskGradient(const ops::AttentionBackward& p)
      : p_(p),
        batch_{p.mask.size(0), p.query.size(0)},
        heads_{p.mask.size(1), p.heads()},
        rows_{p.mask.size(2), p.query.size(2)},
        keys_(p.mask.size(3)) {}

  // A task owns one (batch, head, row tile, key tile) of the mask.
  template <class T>
  void run() const {
    const int64_t row_tiles = count_of(rows_.size, kRows), key_tiles = count_of(keys_, kKeys);
    parallel_each(batch_.size * heads_.size * row_tiles * key_tiles, [&](int64_t index) {
      const int64_t key = index % key_tiles * kKeys, row = index / key_tiles % row_tiles * kRows;
      const int64_t slice = index / key_tiles / row_tiles, batch = slice / heads_.size, head = slice % heads_.size;
      thread_local Scratch scratch;
      float* sum = scratch.take(kTile)[0];
      std::fill_n(sum, kTile, 0.0f);
      if (keys_ > 1) {
        for_sharers(batch, head, [&](int64_t b, int64_t h) { add_scores<T>(b, h, row, key, sum); });
      } else {
        for_sharers(batch, head, [&](int64_t b, int64_t h) { add_rows<T>(b, h, row, sum); });
      }
      write(slice, row, key, sum);
    });
  }

 private:
  template <class Body>
  void for_sharers(int64_t batch, int64_t head, const Body& body) const {
    for (int64_t b = batch_.first(batch); b < batch_.last(batch); ++b) {
      for (int64_t h = heads_.first(head); h < heads_.last(head); ++h) body(b, h);
    }
  }

  template <class T>
  void add_scores(int64_t b, int64_t h, int64_t first_row, int64_t key, float* sum) const {
    using RowTile = BackwardRows<T, ops::AttentionBackward, Scores>;
    thread_local Scratch scratch;
    using Keys = KeyTiles<T, ops::AttentionBackward>;
    const auto [keys, memory, buffers] = scratch.take(Keys::floats(p_), RowTile::floats(p_), TileBuffers<T>::kFloats);
    const TileBuffers<T> tiles(buffers);
    [[maybe_unused]] const typename Products<T>::Session session;
    const ops::Sequence sequence{b, b, 0, rows_.full, 0, keys_};
    const KeyTile<T> tile = Keys(p_, sequence, h / p_.group(), keys).backward(key);
    for (int64_t row = rows_.first(first_row); row < rows_.last(first_row, kRows); row += kRows) {
      const RowTile rows(p_, sequence, h, row, Scores(p_, sequence, h), memory);
      const TilePlace at = rows.make_tiles(tile, tiles);
      for_scores(at, sum, [&](int64_t, int64_t, float* x) { store(x, load(x) + load(tiles.g + (x - sum))); });
    }
  }

  // What the gradients of a row's logits add up to: grad_lse, and exp(sink - lse) delta.
  template <class T>
  void add_rows(int64_t b, int64_t h, int64_t first_row, float* sum) const {
    const float sink = p_.sink({b, b, 0, rows_.full, 0, 0}, h);
    const int64_t statistic = (b * p_.heads() + h) * rows_.full;
    for (int64_t row = rows_.first(first_row); row < rows_.last(first_row, kRows); ++row) {
      const float lse = p_.lse.as<float>()[statistic + row];
      if (lse == -INFINITY) continue;
      const float grad_lse = p_.grad_lse.defined() ? p_.grad_lse.as<float>()[statistic + row] : 0.0f;
      sum[row % kRows] += grad_lse;
      if (sink != -INFINITY) sum[row % kRows] += std::exp(sink - lse) * (grad_times_output<T>(b, h, row) - grad_lse);
    }
  }

  template <class T>
  float grad_times_output(int64_t b, int64_t h, int64_t row) const {
    const Rows<const T> grad(p_.grad_output, b, h, row), output(p_.output, b, h, row);
    float sum = 0.0f;
    for (int64_t c = 0; c < output.columns; ++c) sum += widen(grad.data[c]) * widen(output.data[c]);
    return sum;
  }

  // The tile that begins at (row, key); rows that share an element have come to lie side by side.
  void write(int64_t slice, int64_t row, int64_t key, const float* sum) const {
    float* out = p_.grad_mask.as<float>() + slice * rows_.size * keys_;
    const int64_t rows = std::min(kRows, rows_.size - row), keys = std::min(kKeys, keys_ - key);
    const int64_t lanes = rows_.size == 1 ? std::min(kRows, rows_.full) : 1;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < keys; ++c) {
        const float* from = sum + c * kRows + r;
        out[(row + r) * keys_ + key + c] = std::accumulate(from, from + lanes, 0.0f);
      }
    }
  }

  const ops::AttentionBackward& p_;
  Shared batch_, heads_, rows_;
  int64_t keys_;
};

void attention_backward(const ops::AttentionBackward& p) {
  const Backward backward(p);
  visit_float(p.query.dtype, [&]<class T>(T) {
    backward.run<T>();
    if (p.grad_mask.defined()) MaskGradient(p).run<T>();
  });
}

const Registrar<ops::AttentionBackward> backward{attention_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
