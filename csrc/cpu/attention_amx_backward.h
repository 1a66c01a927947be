// Attention's backward of bf16 on AMX's tiles (formulas: ops/attention.h; masks, biases, dropout:
// cpu/attention_amx_logits.h; tables of biases by distance get their gradients from cpu/attention_rows.h alone).
//
//   A cell is 32 keys and 32 rows, two by two tiles of each product, whose lanes are rows:
//
//     S = key query^T,  D = value grad_output^T      8 kSteps products
//     P = 2^(S - lse),  G = P (D - delta)            2 x 64 vectors
//
//   P and G become tiles twice: lines of 32 rows, which come in pairs (j, 16 + j) since two vectors make one line
//   without moving a lane, and of G also pairs of keys, made of the lines. While the vectors of a cell are worked on,
//   the products of the next one are issued between them. The cells of up to kBlockUnits x 32 rows and of kBlockChunks
//   x 32 keys lie in the first two caches; then
//
//     grad_value += P grad_output,  grad_key += G query      sums over the rows, from zero on, added as a whole
//     grad_query^T += key^T G                                sums over the keys, which go on from block to block
//
//   Keys and values are packed once a task, rows once a block of theirs.
//
//   Where logits are more than products times a factor, S and D are made into S - lse and (D keep / (1 - dropout_p) -
//   delta) cap' before, so that a cell is one exponential and one product a score for all of them. What dropout takes
//   from P it takes afterwards; the scale is grad_value's.
#pragma once

#include <optional>

#include "cpu/attention_amx.h"
#include "cpu/attention_rows.h"

#if defined(LLMENGINE_AMX)

namespace llmengine::cpu::LLMENGINE_ISA {

inline constexpr int kCellTiles = 4;

// What a cell is made of, and what it becomes.
struct AmxCell {
  const bf16 *query, *grad, *keys, *values;  // packed
  float *scores, *grad_weights;              // S and D, a tile after another
  bf16 *weights, *grad_scores, *key_pairs;   // P and G in lines, G in pairs of keys
  // Of each row, a half after the other: log2 of what its weights add up to, what rounding took from that, and delta.
  const float *total, *total_low, *delta;
};
struct AmxSight {  // of each row, in a bit for each key: who sees whom or, of logits, what dropout keeps
  U bits[2];
};

// Makes S and D of `next`, and of those of `now` all that it becomes.
template <int kSteps, AmxSees sees, bool has_next>
__attribute__((noinline)) void amx_cell(const AmxCell& next, const AmxCell& now, const AmxSight& sight, float scale) {
  constexpr int kProducts = kCellTiles * kSteps, kActions = 2 * (kProducts + kCellTiles), kGroups = kChunkKeys / 2,
                kBusy = kGroups - 3;     // the last products have then come when the next cell wants them
  const AmxCell &n = next, &cell = now;  // no copies: they would wait for what was just written
  const auto multiply = [&]<int a>(std::integral_constant<int, a>, const bf16* keys, const bf16* rows)
                            __attribute__((always_inline)) {
                              constexpr int step = a / kCellTiles, key = a % kCellTiles / 2, row = a % 2;
                              if constexpr (step == 0) amx_zero<2 * key + row>();
                              if constexpr (key == 0)
                                amx_load<kAmxB + row>(rows + (row * kSteps + step) * kTileHalves, kAmxRowBytes);
                              if constexpr (row == 0)
                                amx_load<kAmxA + key>(keys + (key * kSteps + step) * kTileHalves, kAmxRowBytes);
                              amx_multiply<key, row>();
                            };
  const auto act = [&]<int a>(std::integral_constant<int, a>) __attribute__((always_inline)) {
    if constexpr (!has_next) return;
    constexpr int kind = a / (kProducts + kCellTiles), i = a % (kProducts + kCellTiles);
    if constexpr (i < kProducts) {
      multiply(std::integral_constant<int, i>(), kind ? n.values : n.keys, kind ? n.grad : n.query);
    } else {
      amx_store<i - kProducts>((kind ? n.grad_weights : n.scores) + (i - kProducts) * kTileFloats, kAmxRowBytes);
    }
  };
  F total[2], total_low[2], delta[2];
  for (int row = 0; row < 2; ++row) {
    total[row] = load(cell.total + row * kLanes), total_low[row] = load(cell.total_low + row * kLanes);
    delta[row] = load(cell.delta + row * kLanes);
  }
  const auto group = [&]<int g>(std::integral_constant<int, g>) __attribute__((always_inline)) {
    constexpr int first = std::min(g, kBusy) * kActions / kBusy, end = std::min(g + 1, kBusy) * kActions / kBusy;
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      (act(std::integral_constant<int, first + i>()), ...);
    }(std::make_integer_sequence<int, end - first>());
    constexpr int tile = 2 * g / kAmxRows, line = 2 * g % kAmxRows;
    U lines[2];
#pragma GCC unroll 2
    for (int key = 0; key < 2; ++key) {
      F p[2], d[2];
#pragma GCC unroll 2
      for (int row = 0; row < 2; ++row) {
        const int64_t at = (2 * tile + row) * kTileFloats + (line + key) * kLanes;
        const F score = load(cell.scores + at), grad = load(cell.grad_weights + at);
        const I bit = has_bit(sight.bits[row], 2 * g + key);
        if constexpr (sees == AmxSees::logits) {
          p[row] = near_power_of_2(score);
          d[row] = p[row] * grad;
          p[row] = select(bit, p[row], F{});
        } else {
          p[row] = near_power_of_2(score * scale - total[row] - total_low[row]);
          d[row] = p[row] * (grad - delta[row]);
        }
        if constexpr (sees == AmxSees::some) p[row] = select(bit, p[row], F{}), d[row] = select(bit, d[row], F{});
      }
      store_pairs(cell.weights + (2 * g + key) * 2 * kLanes, interleaved(p[0], p[1]));
      lines[key] = interleaved(d[0], d[1]);
      store_pairs(cell.grad_scores + (2 * g + key) * 2 * kLanes, lines[key]);
    }
    store_pairs(cell.key_pairs + g * 2 * kLanes, (lines[0] & 0xffff) | (lines[1] << 16));
    store_pairs(cell.key_pairs + kTileHalves + g * 2 * kLanes, (lines[0] >> 16) | (lines[1] & 0xffff0000));
  };
  [&]<int... g>(std::integer_sequence<int, g...>) __attribute__((always_inline)) {
    (group(std::integral_constant<int, g>()), ...);
  }(std::make_integer_sequence<int, kGroups>());
}

// 2 x 2 tiles of C, from zero on or from what they hold: count products, whose operands follow each other at these
// distances. between(n) is done beside product n.
template <bool add, class Between>
inline void amx_sum(const bf16* a, int64_t a_tile, int64_t a_step, const bf16* b, int64_t b_tile, int64_t b_step,
                    int64_t count, float* c, const Between& between) {
  const auto each_c = [&](const auto& body) {
    body.template operator()<0>(), body.template operator()<1>();
    body.template operator()<2>(), body.template operator()<3>();
  };
  each_c([&]<int tile>() {
    if constexpr (add) {
      amx_load<tile>(c + tile * kTileFloats, kAmxRowBytes);
    } else {
      amx_zero<tile>();
    }
  });
  for (int64_t n = 0; n < count; ++n, a += a_step, b += b_step) {
    amx_load<kAmxA>(a, kAmxRowBytes), amx_load<kAmxB>(b, kAmxRowBytes);
    amx_multiply<0, 0>();
    amx_load<kAmxB + 1>(b + b_tile, kAmxRowBytes);
    amx_multiply<0, 1>();
    amx_load<kAmxA + 1>(a + a_tile, kAmxRowBytes);
    amx_multiply<1, 0>();
    amx_multiply<1, 1>();
    between(n);
  }
  each_c([&]<int tile>() { amx_store<tile>(c + tile * kTileFloats, kAmxRowBytes); });
}

// Sums of 32 keys and 32 columns on their way into an accumulator: they are added while the next ones are made.
class AmxSums {
 public:
  explicit AmxSums(float* memory) : memory_(memory) {}
  ~AmxSums() { add(kChunkKeys); }

  // Two by two tiles, for the first `keys` keys and 1 or 2 vectors of columns at `to`.
  void make(const bf16* a, int64_t a_step, const bf16* b, int64_t b_step, int64_t count, float* to, int64_t stride,
            int64_t keys, int64_t vectors) {
    float* sums = memory_ + (turn_ ^= 1) * kCellTiles * kTileFloats;
    amx_sum<false>(a, kTileHalves, a_step, b, kTileHalves, b_step, count, sums,
                   [&](int64_t n) { add((n + 1) * kChunkKeys / count); });
    add(kChunkKeys);
    from_ = sums, to_ = to, stride_ = stride, keys_ = keys, vectors_ = vectors, done_ = 0;
  }

 private:
  void add(int64_t end) {
    for (const int64_t last = std::min(end, keys_); done_ < last; ++done_) {
      const float* from = from_ + done_ / kAmxRows * 2 * kTileFloats + done_ % kAmxRows * kLanes;
      float* to = to_ + done_ * stride_;
      store(to, load(to) + load(from));
      if (vectors_ == 2) store(to + kLanes, load(to + kLanes) + load(from + kTileFloats));
    }
  }

  float *memory_, *to_ = nullptr;
  const float* from_ = nullptr;
  int64_t stride_ = 0, keys_ = 0, vectors_ = 0, done_ = 0;
  int turn_ = 0;
};

// One key head of one sequence.
template <int kSteps>
class AmxBackward {
 public:
  static constexpr int64_t kBlockUnits = 8, kBlockChunks = 4, kUnitRows = 32, kBlockRows = kBlockUnits * kUnitRows;

  AmxBackward(const ops::AttentionBackward& p, const ops::Sequence& s, int64_t key_head)
      : p_(p),
        s_(s),
        band_(p.band(s)),
        plain_(AmxLogits::plain(p)),
        scale_(static_cast<float>(p.scale * 1.4426950408889634)),
        depth_(p.query.size(3)),
        width_(p.value.size(3)) {
    thread_local Scratch scratch;
    const int64_t chunks = count_of(s.keys, kChunkKeys), cells = kBlockUnits * kBlockChunks;
    const auto [keys, units, tiles, cell, sums, statistics] =
        scratch.take(chunks * kChunkHalves / 2, kBlockUnits * kUnitHalves / 2, cells * kCellHalves / 2,
                     int64_t{2} * 2 * kCellTiles * kTileFloats, (kBlockUnits * kSums + 2 * kCellTiles) * kTileFloats,
                     kBlockUnits * 3 * kUnitRows);
    keys_ = halves_of(keys), units_ = halves_of(units), cells_ = halves_of(tiles);
    scores_ = cell, sums_ = sums, statistics_ = statistics;
    if (std::min(depth_, width_) < kSteps * 2 * kLanes) {  // columns that only tiles have
      std::fill_n(keys_, chunks * kChunkHalves, bf16{});
      std::fill_n(units_, kBlockUnits * kUnitHalves, bf16{});
    }
    const Rows<const bf16> key(p.key, s.batch, key_head, s.key0), value(p.value, s.batch, key_head, s.key0);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = c * kChunkKeys, count = std::min<int64_t>(kChunkKeys, s.keys - first);
      bf16* to = keys_ + c * kChunkHalves;
      pack_keys(key, first, count, kSteps, to);
      pack_keys(value, first, count, kSteps, to + kOperand);
      pack_values(key, first, count, to + 2 * kOperand);
    }
  }

  // Rows [row, row + kBlockRows) of a head: their grad_query, and what they give to their keys'. In `to.value` weights
  // are not yet scaled for dropout.
  void add_rows(int64_t head, int64_t row, const KeySums& to) {
    head_ = head, row_ = row, rows_ = std::min(kBlockRows, s_.rows - row);
    logits_.emplace(p_, s_, head);
    shown_ = logits_->keys();
    const int64_t units = count_of(rows_, kUnitRows);
    for (int64_t u = 0; u < units; ++u) read_unit(u);
    std::fill_n(sums_, units * kSums * kTileFloats, 0.0f);
    const Span seen = common(shown_, {band_.begin(row), band_.end(row + rows_ - 1)});
    constexpr int64_t kBlock = kBlockChunks * kChunkKeys;
    for (int64_t first = seen.begin / kBlock * kBlock; first < seen.end; first += kBlock) {
      const int64_t chunks = count_of(std::min(kBlock, s_.keys - first), kChunkKeys);
      for (int64_t c = 0; c < chunks; ++c) make_cells(first, c, units);
      finish();
      AmxSums sums(sums_ + kBlockUnits * kSums * kTileFloats);
      for (int64_t c = 0; c < chunks; ++c) add_to_keys(first, c, sums, to);
      for (int64_t u = 0; u < units; ++u) add_to_rows(first, u, chunks);
    }
    for (int64_t u = 0; u < units; ++u) write(u);
  }

  // Of the rows that were added last.
  int64_t head() const { return head_; }
  int64_t row() const { return row_; }
  double grad_sink() const {
    const float sink = p_.sink(s_, head_);
    const int64_t statistic = (s_.batch * p_.heads() + head_) * p_.query.size(2) + s_.row0 + row_;
    double sum = 0.0;
    if (sink == -INFINITY) return sum;  // so it is in rows of no sequence, whatever their gradients hold
    for (int64_t r = 0; r < rows_; ++r) {
      const float lse = p_.lse.as<float>()[statistic + r], low = p_.lse_low.as<float>()[statistic + r];
      const float weight = std::exp(sink - (lse == -INFINITY ? 0.0f : lse) - low);
      sum -= double{weight} * total(r / kUnitRows)[2 * kUnitRows + r % kUnitRows];
    }
    return sum;
  }

 private:
  static constexpr int kColumnTiles = 2 * kSteps, kSums = 2 * kColumnTiles;
  static constexpr int64_t kOperand = 2 * kSteps * kTileHalves;  // 32 rows or keys
  static constexpr int64_t kChunkHalves = 3 * kOperand;          // key, value, key^T
  static constexpr int64_t kUnitHalves = 4 * kOperand;           // query^T, grad_output^T, and both in pairs of rows
  static constexpr int64_t kCellHalves = 6 * kTileHalves;        // P, G, and G in pairs of keys

  static bf16* halves_of(float* x) { return reinterpret_cast<bf16*>(x); }
  bf16* unit(int64_t u) const { return units_ + u * kUnitHalves; }
  bf16* cell(int64_t c, int64_t u) const { return cells_ + (c * kBlockUnits + u) * kCellHalves; }
  float* total(int64_t u) const { return statistics_ + u * 3 * kUnitRows; }
  int64_t rows_of(int64_t u) const { return std::min(kUnitRows, rows_ - u * kUnitRows); }

  // ---- rows ----

  void read_unit(int64_t u) const {
    const int64_t first = s_.row0 + row_ + u * kUnitRows, rows = rows_of(u);
    const Rows<const bf16> query(p_.query, s_.batch, head_, first), grad(p_.grad_output, s_.batch, head_, first);
    bf16* to = unit(u);
    for (int64_t r = 0, half = 0; half < 2; r += kAmxRows, ++half) {
      const int64_t count = std::clamp<int64_t>(rows - r, 0, kAmxRows);
      pack_unit(Rows<const bf16>(p_.query, s_.batch, head_, first + r), count, to + half * kSteps * kTileHalves);
      pack_unit(Rows<const bf16>(p_.grad_output, s_.batch, head_, first + r), count,
                to + kOperand + half * kSteps * kTileHalves);
    }
    pack_row_pairs(query, rows, to + 2 * kOperand);
    pack_row_pairs(grad, rows, to + 3 * kOperand);
    read_statistics(u, first, rows);
  }

  void read_statistics(int64_t u, int64_t first, int64_t rows) const {
    float *high = total(u), *low = high + kUnitRows, *delta = low + kUnitRows;
    make_delta(u, first, rows, delta);
    const int64_t statistic = (s_.batch * p_.heads() + head_) * p_.query.size(2) + first;
    for (int64_t r = 0; r < kUnitRows; r += kLanes) {
      const int64_t n = std::clamp<int64_t>(rows - r, 0, kLanes);
      const auto read = [&](const TensorView& t, float fill) {
        return load_part(t.as<float>() + statistic + r, n, fill);
      };
      const F lse = read(p_.lse, -INFINITY), lse_low = read(p_.lse_low, 0.0f);
      const F rounded = lse * 1.44269502f;
      const F rest = fused(lse, 1.44269502f, rounded) + (lse * 1.92596303e-8f + lse_low * 1.44269502f);
      // a row that sees nothing, or that there is not: so much that all of its weights are 0
      const I none = lse == -INFINITY;
      const F log_sum = select(lse == lse, plain_ ? rounded : lse, broadcast(NAN));  // rounds to a NaN: see interleaved
      store(high + r, select(none, broadcast(1e30f), log_sum));
      store(low + r, select(none | (rest - rest != F{}), F{}, plain_ ? rest : lse_low));
      if (p_.grad_lse.defined()) {
        const F less = load(delta + r) - read(p_.grad_lse, 0.0f);
        store(delta + r, select(less == less, less, broadcast(NAN)));
      }
    }
  }

  // delta = rowsum(grad_output output), the diagonals of tiles, since those add as D's do: where a row has one key, and
  // output is its value, delta takes the rounding errors of D with it.
  void make_delta(int64_t u, int64_t first, int64_t rows, float* delta) const {
    bf16* lines = cells_;  // none is made yet
    std::fill_n(lines, kOperand, bf16{});
    pack_keys(Rows<const bf16>(p_.output, s_.batch, head_, first), 0, rows, kSteps, lines);
    for (int half = 0; half < 2; ++half) {
      amx_zero<0>();
      for (int step = 0; step < kSteps; ++step) {
        const int64_t at = (half * kSteps + step) * kTileHalves;
        amx_load<kAmxA>(lines + at, kAmxRowBytes);
        amx_load<kAmxB>(unit(u) + kOperand + at, kAmxRowBytes);
        amx_multiply<0, 0>();
      }
      amx_store<0>(scores_, kAmxRowBytes);
      for (int i = 0; i < kAmxRows; ++i) delta[half * kAmxRows + i] = scores_[i * (kLanes + 1)];
    }
  }

  // ---- cells ----

  // The units [begin, end) of the block some row of which sees some key of a chunk.
  Span units_of(int64_t key) const {
    const auto rows = band_.rows_of(key, std::min(key + kChunkKeys, s_.keys));
    const Span mine = common({rows.begin, rows.end}, {row_, row_ + rows_});
    if (mine.count() <= 0 || key + kChunkKeys <= shown_.begin || key >= shown_.end) return {0, 0};
    return {(mine.begin - row_) / kUnitRows, count_of(mine.end - row_, kUnitRows)};
  }

  void make_cells(int64_t block, int64_t c, int64_t units) {
    const int64_t key = block + c * kChunkKeys;
    const Span mine = common(units_of(key), {0, units});
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      Place& next = places_[turn_];
      const bf16 *keys = keys_ + key / kChunkKeys * kChunkHalves, *rows = unit(u);
      float* scores = scores_ + turn_ * 2 * kCellTiles * kTileFloats;
      bf16* tiles = cell(c, u);
      const int64_t row = row_ + u * kUnitRows;
      turn_ ^= 1;
      next.key = key, next.row = row;
      next.rows = rows_of(u);
      next.hides =
          next.rows < kUnitRows || logits_->masked() || !band_.covers(row, row + rows_of(u), key, key + kChunkKeys);
      next.cell = {rows,
                   rows + kOperand,
                   keys,
                   keys + kOperand,
                   scores,
                   scores + kCellTiles * kTileFloats,
                   tiles,
                   tiles + 2 * kTileHalves,
                   tiles + 4 * kTileHalves,
                   total(u),
                   total(u) + kUnitRows,
                   total(u) + 2 * kUnitRows};
      if (now_) {
        advance<true>(next);
      } else {
        make_products(next.cell);
      }
      now_ = &next;
    }
  }
  void finish() {
    if (now_) advance<false>(*now_);
    now_ = nullptr;
  }

  struct Place {
    int64_t key, row, rows;
    bool hides;
    AmxCell cell;
  };

  template <bool has_next>
  void advance(const Place& next) const {
    AmxSight sight{{~U{}, ~U{}}};
    for (int half = 0; now_->hides && half < 2; ++half) {
      const I there = __builtin_bit_cast(I, lane_numbers()) < static_cast<int32_t>(now_->rows - half * kAmxRows);
      sight.bits[half] = now_->rows > half * kAmxRows ? logits_->seen(piece(half)) & __builtin_bit_cast(U, there) : U{};
    }
    if (!plain_) {
      for (int half = 0; half < 2; ++half) sight.bits[half] = make_logits(half, sight.bits[half]);
      amx_cell<kSteps, AmxSees::logits, has_next>(next.cell, now_->cell, sight, scale_);
    } else if (now_->hides) {
      amx_cell<kSteps, AmxSees::some, has_next>(next.cell, now_->cell, sight, scale_);
    } else {
      amx_cell<kSteps, AmxSees::all, has_next>(next.cell, now_->cell, sight, scale_);
    }
  }
  AmxPiece piece(int half) const {
    return {now_->row + half * kAmxRows, std::min<int64_t>(kAmxRows, now_->rows - half * kAmxRows), now_->key};
  }

  // Makes a half of the present rows' S into what their weights are a power of 2 of, and D into what grad_scores are a
  // multiple of; returns what dropout keeps.
  U make_logits(int half, U seen) const {
    if (now_->rows <= half * kAmxRows) {
      each(half, [&](int, float* score, float* grad) { store(score, broadcast(-INFINITY)), store(grad, F{}); });
      return U{};
    }
    const AmxCell& cell = now_->cell;
    alignas(64) float slopes[kChunkKeys * kLanes];
    logits_->make(piece(half), seen, cell.scores + half * kTileFloats, 2 * kTileFloats, slopes);
    const U kept = logits_->drops() ? logits_->kept(piece(half)) : ~U{};
    const F total = load(cell.total + half * kLanes), total_low = load(cell.total_low + half * kLanes),
            delta = load(cell.delta + half * kLanes), keep_scale = broadcast(logits_->keep_scale());
    const bool capped = logits_->capped();
    each(half, [&](int k, float* score, float* grad) {
      store(score, (load(score) - total - total_low) * 1.44269504f);
      F d = select(has_bit(kept, k), load(grad) * keep_scale, F{}) - delta;
      if (capped) d *= load(slopes + k * kLanes);
      store(grad, select(has_bit(seen, k), d, F{}));
    });
    return kept;
  }
  // body(key, its vector of S, of D)
  template <class Body>
  void each(int half, const Body& body) const {
    for (int k = 0; k < kChunkKeys; ++k) {
      const int64_t at = (k / kAmxRows * 2 + half) * kTileFloats + k % kAmxRows * kLanes;
      body(k, now_->cell.scores + at, now_->cell.grad_weights + at);
    }
  }

  static void make_products(const AmxCell& cell) {
    const auto make = [](const bf16* keys, const bf16* rows, float* to) {
      constexpr int64_t half = kSteps * kTileHalves;
      amx_sum<false>(keys, half, kTileHalves, rows, half, kTileHalves, kSteps, to, [](int64_t) {});
    };
    make(cell.keys, cell.query, cell.scores);
    make(cell.values, cell.grad, cell.grad_weights);
  }

  // ---- sums ----

  void add_to_keys(int64_t block, int64_t c, AmxSums& sums, const KeySums& to) const {
    const int64_t key = block + c * kChunkKeys, keys = std::min<int64_t>(kChunkKeys, s_.keys - key);
    const Span units = units_of(key);
    if (units.count() <= 0) return;
    const bf16 *tiles = cell(c, units.begin), *rows = unit(units.begin);
    const auto add = [&](const bf16* a, const bf16* b, int64_t columns, float* lines) {
      const int64_t width = padded(columns);
      for (int64_t column = 0; column < width; column += 2 * kLanes, b += 2 * kTileHalves) {
        sums.make(a, kCellHalves, b, kUnitHalves, units.count(), lines + (key - to.first) * width + column, width, keys,
                  std::min<int64_t>(2, (width - column) / kLanes));
      }
    };
    add(tiles, rows + 3 * kOperand, width_, to.value);
    add(tiles + 2 * kTileHalves, rows + 2 * kOperand, depth_, to.key);
  }

  void add_to_rows(int64_t block, int64_t u, int64_t chunks) const {
    const int64_t row = row_ + u * kUnitRows;
    const Span keys = common({band_.begin(row) - block, band_.end(row + rows_of(u) - 1) - block},
                             {shown_.begin - block, shown_.end - block});
    const Span seen = common({keys.begin / kChunkKeys, count_of(keys.end, kChunkKeys)}, {0, chunks});
    if (keys.count() <= 0 || seen.count() <= 0) return;
    const bf16* a = keys_ + (block / kChunkKeys + seen.begin) * kChunkHalves + 2 * kOperand;
    const bf16* b = cell(seen.begin, u) + 4 * kTileHalves;
    float* sums = sums_ + u * kSums * kTileFloats;
    for (int64_t column = 0; column < depth_; column += 2 * kLanes) {
      amx_sum<true>(a, kTileHalves, kChunkHalves, b, kTileHalves, kBlockUnits * kCellHalves, seen.count(), sums,
                    [](int64_t) {});
      a += 2 * kTileHalves, sums += 4 * kTileFloats;
    }
  }

  void write(int64_t u) const {
    const Rows<bf16> to(p_.grad_query, s_.batch, head_, s_.row0 + row_ + u * kUnitRows);
    const float factor = static_cast<float>(p_.scale);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = half * kAmxRows, rows = std::clamp<int64_t>(rows_of(u) - first, 0, kAmxRows);
      for_lanes(to.columns, [&](int64_t c, auto n) {
        const float* tile = sums_ + (u * kSums + c / kLanes * 2 + half) * kTileFloats;
        F block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(tile + i * kLanes) * factor;
        transpose(block);
        for (int64_t i = 0; i < rows; ++i) store_n(to.row(first + i) + c, block[i], n);
      });
    }
  }

  const ops::AttentionBackward& p_;
  const ops::Sequence& s_;
  ops::Band band_;
  bool plain_;  // see AmxLogits
  std::optional<AmxLogits> logits_;
  Span shown_{};  // from the first to the last key that the mask shows
  float scale_;
  int64_t depth_, width_, head_ = 0, row_ = 0, rows_ = 0;
  bf16 *keys_, *units_, *cells_;
  float *scores_, *sums_, *statistics_;
  Place places_[2];
  int turn_ = 0;
  const Place* now_ = nullptr;
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
#endif
