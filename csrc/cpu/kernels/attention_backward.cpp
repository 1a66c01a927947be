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
//   of threads, so that this changes no bit. They take kTasks times the memory of all keys, in floats; in a window a
//   task has neighbouring rows, and accumulators for the keys alone that those see. Limit: the multiply-add ports.
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

// ---- shares ---------------------------------------------------------------------------------------------------------

constexpr int64_t kTasks = 16;  // about so many of equal work, where there is so much, and no more heads

// How the row tiles of a sequence's key heads are dealt out: one by one, so that all shares have equal work, or in runs
// of neighbours, where those see less than half of the keys.
struct Deal {
  int64_t shares, tiles;
  bool runs = false;

  int64_t begin(int64_t share) const { return runs ? tiles * share / shares : share; }
  int64_t end(int64_t share) const { return runs ? tiles * (share + 1) / shares : tiles; }
  int64_t step() const { return runs ? 1 : shares; }
};

// ---- grad_distance_bias ---------------------------------------------------------------------------------------------

// Of each sequence and head, a table for each share of its rows (Backward::shares) of the entries that its distances
// reach.
class DistanceSums {
 public:
  DistanceSums(const ops::AttentionBackward& p, const std::vector<ops::Sequence>& sequences,
               const std::vector<Deal>& deals)
      : p_(p) {
    if (!wanted()) return;
    int64_t total = 0;
    for (size_t n = 0; n < sequences.size(); ++n) {
      const ops::Sequence& s = sequences[n];
      const int64_t shift = p.band(s).shift, most = p.farthest();
      const int64_t first = ops::clamp_index(1 - s.rows - shift, -most, most) + most;
      const int64_t end = ops::clamp_index(s.keys - 1 - shift, -most, most) + most + 1;
      tables_.push_back({total, first, s.rows && s.keys ? end - first : 0, deals[n].shares});
      total += tables_.back().entries * p.heads() * deals[n].shares;
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

class Backward {
 public:
  explicit Backward(const ops::AttentionBackward& p)
      : p_(p),
        depth_(padded(p.query.size(3))),
        width_(padded(p.value.size(3))),
        tiled_(tiles(p)),
        value_factor_(tiled_ ? Dropout(p.dropout_p, p.seed).keep_scale : 1.0f),
        sequences_(ops::sequences_of(p)),
        deals_(deals()),
        distances_(p, sequences_, deals_),
        sinks_(p, sequences_),
        tasks_(sequences_, [&](size_t s) { return p.key_heads() * deals_[s].shares; }) {
    int64_t total = 0;
    for (size_t s = 0; s < sequences_.size(); ++s) {
      first_share_.push_back(std::ssize(offsets_));
      if (deals_[s].shares == 1) continue;
      for (int64_t i = 0; i < p.key_heads() * deals_[s].shares; ++i) {
        offsets_.push_back(total);
        total += floats(keys_of(sequences_[s], deals_[s], i % deals_[s].shares));
      }
    }
    take_partials(total);
  }

  template <class T>
  void run() const {
    parallel_each(tasks_.size(), [&](int64_t index) { task<T>(tasks_[index]); });
    const SequenceTasks sums(sequences_, [&](size_t s) {
      return deals_[s].shares > 1 ? p_.key_heads() * count_of(sequences_[s].keys, kKeys) : 0;
    });
    parallel_each(sums.size(), [&](int64_t index) { add_partials<T>(sums[index]); });
    if (distances_.wanted()) distances_.write();
    if (sinks_.wanted()) sinks_.write();
  }

 private:
  std::vector<Deal> deals() const {
    int64_t total = 0;
    for (const ops::Sequence& s : sequences_) total += p_.key_heads() * s.rows * s.keys;
    std::vector<Deal> deals;
    for (const ops::Sequence& s : sequences_) {
      const int64_t wanted = total ? (kTasks * s.rows * s.keys + total / 2) / total : 1, tiles = row_tiles(s);
      Deal deal{std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, tiles)), tiles, true};
      int64_t seen = 0;
      for (int64_t share = 0; share < deal.shares; ++share) seen += keys_of(s, deal, share).count();
      deal.runs = 2 * seen < deal.shares * s.keys;
      deals.push_back(deal);
    }
    return deals;
  }

  // The keys that a share's rows may see, in whole tiles.
  Span keys_of(const ops::Sequence& s, const Deal& deal, int64_t share) const {
    if (!deal.runs) return {0, s.keys};
    const int64_t group = p_.group(), size = tile_rows(), blocks = deal.tiles / group;  // the last rows come first
    const int64_t row = (blocks - 1 - (deal.end(share) - 1) / group) * size;
    const int64_t row_end = std::min((blocks - deal.begin(share) / group) * size, s.rows);
    const auto seen = p_.band(s).keys_of(row, row_end);
    return {seen.begin / kKeys * kKeys, std::min(round_up(std::max(seen.end, seen.begin), kKeys), s.keys)};
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

  // Accumulators of a key head's keys: grad_key (keys, depth_), then grad_value (keys, width_).
  int64_t floats(Span keys) const { return keys.count() * (depth_ + width_); }
  KeySums sums(float* memory, Span keys) const { return {memory, memory + keys.count() * depth_, keys.begin}; }
  float* partial(const SequenceTasks::Task& at, int64_t key_head, int64_t share) const {
    return partials_ + offsets_[first_share_[at.which] + key_head * deals_[at.which].shares + share];
  }

  template <class T>
  void task(const SequenceTasks::Task& at) const {
    const ops::Sequence& s = at.sequence;
    const Deal& deal = deals_[at.which];
    const int64_t key_head = at.number / deal.shares, share = at.number % deal.shares;
    const Span keys = deal.shares > 1 ? keys_of(s, deal, share) : Span{0, s.keys};
    thread_local Scratch accumulators;
    float* memory = deal.shares > 1 ? partial(at, key_head, share) : accumulators.take(floats(keys))[0];
    std::fill_n(memory, floats(keys), 0.0f);
    [[maybe_unused]] const typename Products<T>::Session session;
    if (tiled_) {
      add_tiled_rows(at, key_head, share, sums(memory, keys));
    } else {
      add_rows<T>(at, key_head, share, sums(memory, keys));
    }
    if (deal.shares == 1) write<T>(sums(memory, keys), s, key_head, s.keys);
  }

  // What a share of the rows gives to their keys.
  template <class T>
  void add_rows(const SequenceTasks::Task& at, int64_t key_head, int64_t share, const KeySums& to) const {
    using RowTile = BackwardRows<T, ops::AttentionBackward, Scores>;
    const ops::Sequence& s = at.sequence;
    const RowTiles places(p_, s);
    const Deal& deal = deals_[at.which];
    const int64_t together = tiles_together(RowTile::floats(p_)), end = deal.end(share);
    using Keys = KeyTiles<T, ops::AttentionBackward>;
    thread_local Scratch scratch;
    const auto [keys, memory, scores] =
        scratch.take(Keys::floats(p_), RowTile::floats(p_) * together, TileBuffers<T>::kFloats);
    const Keys key_tiles(p_, s, key_head, keys);
    const TileBuffers<T> tiles(scores);
    std::vector<RowTile> all;
    all.reserve(static_cast<size_t>(together));
    for (int64_t n = deal.begin(share); n < end;) {
      all.clear();
      for (float* own = memory; n < end && std::ssize(all) < together; n += deal.step()) {
        const int64_t head = places.head(n, key_head);
        all.emplace_back(p_, s, head, places.row(n), Scores(p_, s, head), own);
        own += RowTile::floats(p_);
      }
      const auto make = [&](int64_t first) { return key_tiles.backward(first); };
      for_key_tiles(s.keys, all, make, [&](RowTile& rows, const KeyTile<T>& tile) {
        const TilePlace place = rows.make_tiles(tile, tiles);
        if (distances_.wanted()) distances_.add(at, rows.head(), share, place, tiles.g);
        rows.accumulate(place, tile, tiles, to);
      });
      for (const RowTile& rows : all) {
        rows.write();
        if (sinks_.wanted()) sinks_.set(at, rows);
      }
    }
  }

#if defined(LLMENGINE_AMX)
  static bool tiles(const ops::AttentionBackward& p) { return amx_takes(p) && !p.grad_distance_bias.defined(); }
  int64_t tile_rows() const { return tiled_ ? AmxBackward<1>::kBlockRows : kRows; }
  void add_tiled_rows(const SequenceTasks::Task& at, int64_t key_head, int64_t share, const KeySums& to) const {
    const auto tile = [&]<int steps>(std::integral_constant<int, steps>) {
      AmxBackward<steps> all(p_, at.sequence, key_head);
      const Deal& deal = deals_[at.which];
      const int64_t group = p_.group(), blocks = deal.tiles / group;
      for (int64_t n = deal.begin(share); n < deal.end(share); n += deal.step()) {
        all.add_rows(key_head * group + n % group, (blocks - 1 - n / group) * all.kBlockRows, to);
        if (sinks_.wanted()) sinks_.set(at, all);
      }
    };
    amx_steps(p_, tile);
  }
#else
  static bool tiles(const ops::AttentionBackward&) { return false; }
  int64_t tile_rows() const { return kRows; }
  void add_tiled_rows(const SequenceTasks::Task&, int64_t, int64_t, const KeySums&) const {}
#endif
  int64_t row_tiles(const ops::Sequence& s) const { return p_.group() * count_of(s.rows, tile_rows()); }

  // `count` keys of a key head
  template <class T>
  void write(const KeySums& from, const ops::Sequence& s, int64_t key_head, int64_t count) const {
    const int64_t key = s.key0 + from.first;
    store_rows(from.key, depth_, count, static_cast<float>(p_.scale), Rows<T>(p_.grad_key, s.batch, key_head, key));
    store_rows(from.value, width_, count, value_factor_, Rows<T>(p_.grad_value, s.batch, key_head, key));
  }

  template <class T>
  void add_partials(const SequenceTasks::Task& at) const {
    const ops::Sequence& s = at.sequence;
    const int64_t tiles = count_of(s.keys, kKeys), key_head = at.number / tiles;
    const Span mine{at.number % tiles * kKeys, std::min(at.number % tiles * kKeys + kKeys, s.keys)};
    thread_local Scratch scratch;
    float* memory = scratch.take(kKeys * (depth_ + width_))[0];
    std::fill_n(memory, floats(mine), 0.0f);
    const KeySums to = sums(memory, mine);
    for (int64_t share = 0; share < deals_[at.which].shares; ++share) {
      const Span keys = keys_of(s, deals_[at.which], share);
      if (common(keys, mine).count() <= 0) continue;  // all of them or none: shares have whole tiles
      const KeySums from = sums(partial(at, key_head, share), keys);
      add(from.key + (mine.begin - keys.begin) * depth_, mine.count() * depth_, to.key);
      add(from.value + (mine.begin - keys.begin) * width_, mine.count() * width_, to.value);
    }
    write<T>(to, s, key_head, mine.count());
  }
  static void add(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }

  const ops::AttentionBackward& p_;
  int64_t depth_, width_;
  bool tiled_;  // by cpu/attention_amx_backward.h
  float value_factor_;
  std::vector<ops::Sequence> sequences_;
  std::vector<Deal> deals_;
  DistanceSums distances_;
  SinkSums sinks_;
  SequenceTasks tasks_;
  std::vector<int64_t> first_share_, offsets_;  // of a sequence's shares, where they have accumulators of their own
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
