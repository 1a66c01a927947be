// Attention of bf16 on AMX's tiles where nothing but a band stands between products and logits: the forward
// (cpu/attention_rows.h does everything else; formulas: ops/attention.h).
//
//   A unit is 16 rows of one head, which a lane each have in every vector below. It meets chunks of 32 keys:
//
//     S = key query^T     2 tiles of (16 keys, 16 rows), each of kSteps products
//     P = 2^(S - m)       32 vectors; rounded to bf16 with the next key's beside them they are the tile that comes next
//     O += value^T P      kTiles tiles of (16 columns, 16 rows), up to four of which stay in registers
//
//   The three are a pipeline: products of the chunk that comes and of the one that went by are issued between the
//   exponentials of the present one, since tiles and vectors are worked on by different units of a core. While tiles
//   multiply, one of the two ports for vectors does no multiplication: an exponential of seven, and no maximum.
//
//   m is no maximum: it is the greatest logit of the first chunk in which a row sees anything, and moves only where
//   later weights grow beyond 2^40, which their sums tell. bf16 has the exponents of a float, so that a weight above 1
//   is as exact as one below; values beyond 3e26 may overflow beside such weights, and logits beyond 1e9 are lost.
//
//   Keys and values lie packed, a tile after another, in a block of chunks that the second-level cache holds while all
//   units of a task meet it: sums that leave their registers less often are worth more than operands in the first.
//
//   Limit: the port that multiplies, 8.5 instructions a vector of scores, while the tiles take 4 of those cycles at
//   head_dim 64.
#pragma once

#include "cpu/attention_rows.h"

#if defined(LLMENGINE_AMX)

namespace llmengine::cpu::LLMENGINE_ISA {

inline constexpr int kUnitRows = kAmxRows, kChunkKeys = 32, kTileHalves = 512, kTileFloats = 256;

#define LLMENGINE_INLINE __attribute__((always_inline)) inline

// x - floor(x), 0 of an infinity, and 2^floor(x) p; of a NaN they are NaN
LLMENGINE_INLINE F fraction(F x) {
#if defined(__AVX512DQ__)
  return __builtin_bit_cast(F, _mm512_maskz_reduce_ps(0xffff, __builtin_bit_cast(__m512, x), 9));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::isinf(x[i]) ? 0.0f : x[i] - std::floor(x[i]);
  return x;
#endif
}
LLMENGINE_INLINE F times_power(F p, F x) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(
      F, _mm512_maskz_scalef_ps(0xffff, __builtin_bit_cast(__m512, p), __builtin_bit_cast(__m512, x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::isnan(x[i]) ? x[i] : p[i] * std::exp2(std::floor(x[i]));
  return x;
#endif
}

// x y - z, rounded once, whatever the compiler makes of such an expression.
LLMENGINE_INLINE F fused(F x, float y, F z) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F, _mm512_maskz_fmsub_ps(0xffff, __builtin_bit_cast(__m512, x), _mm512_set1_ps(y),
                                                     __builtin_bit_cast(__m512, z)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::fma(x[i], y, -z[i]);
  return x;
#endif
}

// 2^x within 1.6e-7; 1 at 0, 0 at -inf.
LLMENGINE_INLINE F power_of_2(F x) {
  const F r = fraction(x);
  F p = broadcast(0.001879318617284298f);
  p = p * r + 0.008990995585918427f;
  p = p * r + 0.05581867694854736f;
  p = p * r + 0.240159273147583f;
  p = p * r + 0.6931517124176025f;
  p = p * r + 1.0f;
  return times_power(p, x);
}
// Within 3.5e-6, for what is rounded to bf16 and to nothing else.
LLMENGINE_INLINE F near_power_of_2(F x) {
  const F r = fraction(x);
  F p = broadcast(0.013555746525526047f);
  p = p * r + 0.05203237012028694f;
  p = p * r + 0.2413797676563263f;
  p = p * r + 0.6930321455001831f;
  p = p * r + 1.0f;
  return times_power(p, x);
}

// Two vectors of finite floats of at least 0, rounded to bf16 (halves upwards) and interleaved.
LLMENGINE_INLINE U interleaved(F even, F odd) {
  const U low = (__builtin_bit_cast(U, even) + 0x8000) >> 16, high = __builtin_bit_cast(U, odd) + 0x8000;
#if defined(__AVX512F__)
  return __builtin_bit_cast(
      U, _mm512_ternarylogic_epi32(__builtin_bit_cast(__m512i, low), __builtin_bit_cast(__m512i, high),
                                   _mm512_set1_epi32(static_cast<int>(0xffff0000)), 0xf8));
#else
  return low | (high & 0xffff0000);
#endif
}

// A chunk of keys for a unit.
struct AmxChunk {
  const bf16 *query, *keys, *values;
  float* scores;
  bf16* weights;
};
// How a unit's products become weights: 2^(factor product - shift) for keys [begin, end) of the chunk.
struct AmxWeights {
  F factor, shift;
  I begin, end;
};

// Makes the scores of `next`, the weights of `now`, whose sums it returns, and adds the values of `last` to tiles 0 to
// kResident - 1.
template <int kSteps, int kResident, bool banded, bool has_next, bool has_last>
__attribute__((noinline)) F amx_step(const AmxChunk& next, const AmxChunk& now, const AmxWeights& weights,
                                     const AmxChunk& last) {
  constexpr int kScores = 2 * kSteps, kActions = kScores + kResident, kGroups = 8, kKeys = kChunkKeys / kGroups;
  const AmxChunk n = next, l = last;
  const auto act = [&]<int a>(std::integral_constant<int, a>) __attribute__((always_inline)) {
    if constexpr (a < kScores && has_next) {
      constexpr int step = a / 2, half = a % 2;
      if constexpr (step == 0) amx_zero<4 + half>();
      if constexpr (half == 0) amx_load<7>(n.query + step * kTileHalves, kAmxRowBytes);
      amx_load<6>(n.keys + (half * kSteps + step) * kTileHalves, kAmxRowBytes);
      amx_multiply_tiles<4 + half, 6, 7>();
    }
    if constexpr (a >= kScores && has_last) {
      constexpr int tile = a - kScores;
      if constexpr (tile == 0) amx_load<7>(l.weights, kAmxRowBytes);
      amx_load<6>(l.values + tile * kTileHalves, kAmxRowBytes);
      amx_multiply_tiles<tile, 6, 7>();
    }
  };
  const F factor = weights.factor, shift = weights.shift;
  F sums[kKeys] = {};
  const auto group = [&]<int g>(std::integral_constant<int, g>) __attribute__((always_inline)) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      (act(std::integral_constant<int, g * kActions / kGroups + i>()), ...);
    }(std::make_integer_sequence<int, (g + 1) * kActions / kGroups - g * kActions / kGroups>());
    F p[kKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const int key = g * kKeys + i;
      p[i] = power_of_2(load(now.scores + key * kLanes) * factor - shift);
      if constexpr (banded) p[i] = select((weights.begin <= key) & (weights.end > key), p[i], F{});
      sums[i] += p[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; i += 2) {
      store_pairs(now.weights + (g * kKeys + i) * kLanes, interleaved(p[i], p[i + 1]));
    }
  };
  [&]<int... g>(std::integer_sequence<int, g...>) __attribute__((always_inline)) {
    (group(std::integral_constant<int, g>()), ...);
  }(std::make_integer_sequence<int, kGroups>());
  if constexpr (has_next) {
    amx_store<4>(n.scores, kAmxRowBytes);
    amx_store<5>(n.scores + kTileFloats, kAmxRowBytes);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// ---- packing --------------------------------------------------------------------------------------------------------

// 16 rows as a right operand: pairs of columns, a row in each lane.
inline void pack_unit(const Rows<const bf16>& x, int64_t rows, bf16* to) {
  for (int64_t k = 0; k < x.columns; k += 2 * kLanes, to += kTileHalves) {
    U block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = i < rows ? consecutive(x.row(i) + k, x.columns - k) : U{};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_pairs(to + 2 * i * kLanes, block[i]);
  }
}

// Rows come into the second-level cache while others are worked on.
inline void fetch_rows(const Rows<const bf16>& x, int64_t first, int64_t end) {
  for (int64_t r = first; r < end; ++r) {
    for (int64_t c = 0; c < x.columns; c += 32) __builtin_prefetch(x.row(r) + c, 0, 2);
  }
}

// A chunk of keys as a left operand, in tiles of 16 keys and 32 columns, `steps` side by side; zeros beyond.
inline void pack_keys(const Rows<const bf16>& x, int64_t first, int64_t count, int64_t steps, bf16* to) {
  for (int64_t key = 0; key < kChunkKeys; ++key) {
    bf16* line = to + (key / kAmxRows * steps * kAmxRows + key % kAmxRows) * 2 * kLanes;
    for (int64_t k = 0; k < steps * 2 * kLanes; k += 2 * kLanes, line += kTileHalves) {
      store_pairs(line, key < count && k < x.columns ? consecutive(x.row(first + key) + k, x.columns - k) : U{});
    }
  }
}

// A chunk of values as a left operand, transposed, in tiles of 16 columns and 32 keys.
inline void pack_values(const Rows<const bf16>& x, int64_t first, int64_t count, bf16* to) {
  for (int64_t c = 0; c < x.columns; c += kAmxRows, to += kTileHalves) {
    const bf16* from = x.row(first) + c;
    if (count < kChunkKeys || x.columns - c < kAmxRows) {
      pack_lines_transposed(from, x.stride, std::min<int64_t>(kAmxRows, x.columns - c), count, to, kChunkKeys);
      continue;
    }
    U block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      block[i] = halves(from + 2 * i * x.stride) | halves(from + (2 * i + 1) * x.stride) << 16;
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_pairs(to + 2 * i * kLanes, block[i]);
  }
}

// The keys [begin, end) that each of 16 rows sees, counted from `key` on, which lies near to them or else beyond.
struct AmxBand {
  I begin, end;
  AmxBand(const ops::Band& band, int64_t row, int64_t key) {
    const auto near = [](int64_t x) { return static_cast<int32_t>(ops::clamp_index(x, -64, 64)); };
    const int64_t position = row + band.shift - key;
    const I lanes = __builtin_bit_cast(I, lane_numbers()), keys = I{} + near(band.keys - key);
    const int64_t left = std::min(band.left, band.rows + band.keys),
                  right = std::min(band.right, band.rows + band.keys);
    const I first = lanes + near(position - left), last = lanes + near(position + right + 1);
    begin = band.left < 0 ? I{} : first;
    end = band.right < 0 ? keys : (last < keys ? last : keys);
  }
};

// ---- the forward ----------------------------------------------------------------------------------------------------

// What it takes: no more than a band between products and logits, and a head that tiles hold.
inline bool amx_takes(const ops::AttentionOptions& p) {
  const bool plain = !p.mask.defined() && !p.alibi_slopes.defined() && !p.distance_bias.defined();
  const float factor = static_cast<float>(p.scale * 1.4426950408889634);
  return plain && p.softcap == 0 && p.dropout_p == 0 && factor > 0 && factor < INFINITY &&
         std::max(p.query.size(3), p.value.size(3)) <= 4 * 2 * kLanes;
}

// Calls body with the number of products that head_dim and value_dim take.
template <class Body>
void amx_steps(const ops::AttentionOptions& p, const Body& body) {
  switch (count_of(std::max(p.query.size(3), p.value.size(3)), 2 * kLanes)) {
    case 0:
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    default: return body(std::integral_constant<int, 4>());
  }
}

// The units [first, end) of a key head against all of its keys. kSteps: products of head_dim.
template <int kSteps>
class AmxForward {
 public:
  static constexpr int kTiles = 2 * kSteps, kResident = std::min(kTiles, 4);
  static constexpr int64_t kChunkHalves = (2 * kSteps + kTiles) * kTileHalves;
  static constexpr int64_t kChunks = std::max<int64_t>(2, (int64_t{256} << 10) / (2 * kChunkHalves));  // of a block
  static constexpr int64_t kUnitFloats = kTiles * kTileFloats + kSteps * kTileHalves / 2 + 2 * kUnitRows;

  static int64_t units(const ops::AttentionOptions& p, const ops::Sequence& s) {
    return p.group() * count_of(s.rows, kUnitRows);
  }
  // Those of the last rows, which have the most keys where attention is causal, come first.
  AmxForward(const ops::AttentionForward& p, const ops::Sequence& s, int64_t key_head, Span units)
      : p_(p),
        s_(s),
        band_(p.band(s)),
        factor_(static_cast<float>(p.scale * 1.4426950408889634)),
        key_(p.key, s.batch, key_head, s.key0),
        value_(p.value, s.batch, key_head, s.key0) {
    thread_local Scratch scratch;
    const auto [memory, block, weights, scores] = scratch.take(kUnitFloats * units.count(), kChunks * kChunkHalves / 2,
                                                               2 * kChunks * kTileHalves / 2, int64_t{4} * kTileFloats);
    block_ = reinterpret_cast<bf16*>(block), weights_ = reinterpret_cast<bf16*>(weights), scores_ = scores;
    units_.reserve(static_cast<size_t>(units.count()));
    for (int64_t n = units.begin; n < units.end; ++n) add_unit(n, key_head, memory + (n - units.begin) * kUnitFloats);
  }

  void run() {
    const PairSession session;
    Span seen{s_.keys, 0};
    for (const Unit& unit : units_) {
      if (unit.seen.count() > 0) seen = {std::min(seen.begin, unit.seen.begin), std::max(seen.end, unit.seen.end)};
    }
    for (int64_t first = seen.begin / kBlock * kBlock; first < seen.end; first += kBlock) {
      const Span keys = common(seen, {first, first + kBlock});
      pack(first, keys);
      for (size_t n = 0; n < units_.size(); ++n) {
        fetch(n, common(seen, {first + kBlock, first + 2 * kBlock}));
        Unit& unit = units_[n];
        const Span mine = common(unit.seen, keys);
        if (mine.count() <= 0) continue;
        if (!unit.ready) begin(unit);
        parity_ ^= 1;
        for (int64_t c = (mine.begin - first) / kChunkKeys; c * kChunkKeys < mine.end - first; ++c) {
          push(unit, first, c);
        }
      }
      drain();
    }
    for (Unit& unit : units_) {
      if (!unit.ready) begin(unit);
      write(unit);
    }
  }

 private:
  static constexpr int64_t kBlock = kChunks * kChunkKeys;

  struct Unit {
    int64_t head, row, rows;
    Span seen, full;   // the keys that some row sees, and those that all see
    bool ready, open;  // query is packed; some row has no reference yet
    float *sums, *reference, *total;
    bf16* query;
  };
  struct Place {  // a chunk for a unit
    Unit* unit = nullptr;
    int64_t key = 0, chunk = 0;
    bool banded = false;
    AmxChunk at{};
  };

  void add_unit(int64_t n, int64_t key_head, float* memory) {
    const int64_t group = p_.group(), row = (count_of(s_.rows, kUnitRows) - 1 - n / group) * kUnitRows;
    Unit unit{};
    unit.head = key_head * group + n % group, unit.row = row, unit.rows = std::min<int64_t>(kUnitRows, s_.rows - row);
    const auto keys = band_.keys_of(row, row + unit.rows);
    unit.seen = {keys.begin, keys.end}, unit.full = {keys.full, keys.full_end};
    unit.sums = memory;
    unit.query = reinterpret_cast<bf16*>(memory + kTiles * kTileFloats);
    unit.reference = memory + kTiles * kTileFloats + kSteps * kTileHalves / 2;
    unit.total = unit.reference + kUnitRows;
    units_.push_back(unit);
  }

  void begin(Unit& unit) const {
    unit.ready = true;
    std::fill_n(unit.sums, kTiles * kTileFloats, 0.0f);
    if (p_.query.size(3) < kSteps * 2 * kLanes) std::fill_n(unit.query, kSteps * kTileHalves, bf16{});
    pack_unit(Rows<const bf16>(p_.query, s_.batch, unit.head, s_.row0 + unit.row), unit.rows, unit.query);
    const float sink = p_.sink(s_, unit.head);  // a logit that comes before all others, or -inf
    unit.open = sink == -INFINITY;
    store(unit.reference, broadcast(sink * 1.44269504f));
    store(unit.total, broadcast(unit.open ? 0.0f : 1.0f));
  }

  // What is read after unit n comes nearer meanwhile: the next unit's query, and its part of the next block.
  void fetch(size_t n, Span next_block) const {
    if (n + 1 < units_.size() && !units_[n + 1].ready) {
      const Unit& unit = units_[n + 1];
      fetch_rows(Rows<const bf16>(p_.query, s_.batch, unit.head, s_.row0 + unit.row), 0, unit.rows);
    }
    const int64_t units = std::ssize(units_), count = std::max<int64_t>(next_block.count(), 0);
    const int64_t first = next_block.begin + static_cast<int64_t>(n) * count / units;
    const int64_t end = next_block.begin + static_cast<int64_t>(n + 1) * count / units;
    fetch_rows(key_, first, end), fetch_rows(value_, first, end);
  }

  void pack(int64_t first, Span keys) const {
    for (int64_t c = (keys.begin - first) / kChunkKeys; c * kChunkKeys < keys.end - first; ++c) {
      bf16* to = block_ + c * kChunkHalves;
      const int64_t key = first + c * kChunkKeys, count = std::min<int64_t>(kChunkKeys, s_.keys - key);
      pack_keys(key_, key, count, kSteps, to);
      pack_values(value_, key, count, to + 2 * kSteps * kTileHalves);
    }
  }

  // ---- the pipeline ----

  // Places stay where they are made, in one of three that take turns: copies of what was just written would wait.
  void push(Unit& unit, int64_t first, int64_t chunk) {
    Place& next = places_[turn_];
    turn_ = turn_ == 2 ? 0 : turn_ + 1, even_ ^= 1;
    const bf16* keys = block_ + chunk * kChunkHalves;
    next.unit = &unit, next.key = first + chunk * kChunkKeys, next.chunk = chunk;
    next.banded = next.key < unit.full.begin || next.key + kChunkKeys > unit.full.end;
    next.at.query = unit.query, next.at.keys = keys, next.at.values = keys + 2 * kSteps * kTileHalves;
    next.at.scores = scores_ + even_ * 2 * kTileFloats;
    next.at.weights = weights_ + (kTiles > kResident ? parity_ * kChunks + chunk : turn_) * kTileHalves;
    if (now_) {
      advance<true>(next);
    } else {
      make_scores(next.at);
    }
    now_ = &next;
  }
  void drain() {
    if (now_) {
      advance<false>(*now_);
      make_resident(*last_);
      add_values(last_->at);
    }
    evict();
    now_ = last_ = nullptr;
  }

  template <bool has_next>
  void advance(const Place& next) {
    Unit& unit = *now_->unit;
    AmxWeights weights{broadcast(factor_), {}, {}, {}};
    if (now_->banded) {
      const AmxBand seen(band_, unit.row, now_->key);
      weights.begin = seen.begin, weights.end = seen.end;
    }
    if (unit.open) refer(weights);
    const F reference = load(unit.reference);
    weights.shift = unit.open ? select(reference == -INFINITY, F{}, reference) : reference;
    F sums;
    if (last_) {
      make_resident(*last_);
      sums = now_->banded ? amx_step<kSteps, kResident, true, has_next, true>(next.at, now_->at, weights, last_->at)
                          : amx_step<kSteps, kResident, false, has_next, true>(next.at, now_->at, weights, last_->at);
    } else {
      sums = now_->banded ? amx_step<kSteps, kResident, true, has_next, false>(next.at, now_->at, weights, now_->at)
                          : amx_step<kSteps, kResident, false, has_next, false>(next.at, now_->at, weights, now_->at);
    }
    if (all(sums < kMost)) {
      store(unit.total, load(unit.total) + sums);
    } else {
      redo(weights, sums < kMost);
    }
    last_ = now_;
  }

  // Weights beyond it make their row choose another reference.
  static constexpr float kMost = 1099511627776.0f;

  static bool all(I condition) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(__builtin_bit_cast(__m512i, condition), __builtin_bit_cast(__m512i, condition)) ==
           0xffff;
#else
    for (int i = 0; i < kLanes; ++i) {
      if (!condition[i]) return false;
    }
    return true;
#endif
  }

  // Rows that see their first keys refer to the greatest of their logits.
  void refer(const AmxWeights& weights) const {
    Unit& unit = *now_->unit;
    const F before = load(unit.reference), most = largest(weights) * factor_;
    store(unit.reference, select(before == -INFINITY, most, before));
    unit.open = !all(load(unit.reference) > -INFINITY);
  }

  F product(const AmxWeights& weights, int key) const {
    const F x = load(now_->at.scores + key * kLanes);
    if (!now_->banded) return x;
    return select((weights.begin <= key) & (weights.end > key), x, broadcast(-INFINITY));
  }
  F largest(const AmxWeights& weights) const {
    F most[4];
    for (F& m : most) m = broadcast(-INFINITY);
    for (int key = 0; key < kChunkKeys; key += 4) {
      for (int i = 0; i < 4; ++i) most[i] = max(most[i], product(weights, key + i));
    }
    return max(max(most[0], most[1]), max(most[2], most[3]));
  }

  // The present weights once more, and what is infinite or no number as such. Rows that are not calm refer to their
  // greatest logit so far; the others get what they had, bit by bit.
  void redo(const AmxWeights& weights, I calm) {
    Unit& unit = *now_->unit;
    if (resident_ == &unit) evict();
    const F before = load(unit.reference), most = select(calm, before, max(before, largest(weights) * factor_));
    const F shift = select(most == -INFINITY, F{}, most);
    F sums[4] = {};
    for (int key = 0; key < kChunkKeys; key += 2) {
      F p[2];
      for (int i = 0; i < 2; ++i) {
        p[i] = product(weights, key + i) * factor_ - shift;
        p[i] = select(p[i] == -INFINITY, F{}, power_of_2(p[i]));
        sums[(key + i) % 4] += p[i];
      }
      store_pairs(now_->at.weights + key * kLanes, interleaved(p[0], p[1]));
    }
    const F scale = select(before == -INFINITY, F{}, power_of_2(before - shift));
    store(unit.reference, most);
    store(unit.total, load(unit.total) * scale + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    for (int64_t i = 0; i < kTiles * kTileFloats; i += kLanes) store(unit.sums + i, load(unit.sums + i) * scale);
  }

  // ---- tiles ----

  void make_scores(const AmxChunk& at) const {
    for (int half = 0; half < 2; ++half) {
      amx_zero<4>();
      for (int step = 0; step < kSteps; ++step) {
        amx_load<7>(at.query + step * kTileHalves, kAmxRowBytes);
        amx_load<6>(at.keys + (half * kSteps + step) * kTileHalves, kAmxRowBytes);
        amx_multiply_tiles<4, 6, 7>();
      }
      amx_store<4>(at.scores + half * kTileFloats, kAmxRowBytes);
    }
  }

  template <class Body>
  static void for_resident(const Body& body) {
    [&]<int... tile>(std::integer_sequence<int, tile...>) {
      (body(std::integral_constant<int, tile>()), ...);
    }(std::make_integer_sequence<int, kResident>());
  }

  void add_values(const AmxChunk& at) const {
    amx_load<7>(at.weights, kAmxRowBytes);
    for_resident([&]<int tile>(std::integral_constant<int, tile>) {
      amx_load<6>(at.values + tile * kTileHalves, kAmxRowBytes);
      amx_multiply_tiles<tile, 6, 7>();
    });
  }

  // The sums of a chunk's unit come into registers; those of another one leave.
  void make_resident(const Place& chunk) {
    if (resident_ != chunk.unit) {
      evict();
      resident_ = chunk.unit, resident_chunks_.begin = chunk.chunk;
      resident_values_ = chunk.at.values, resident_weights_ = chunk.at.weights;
      for_resident([&]<int tile>(std::integral_constant<int, tile>) {
        amx_load<tile>(resident_->sums + tile * kTileFloats, kAmxRowBytes);
      });
    }
    resident_chunks_.end = chunk.chunk + 1;
  }
  void evict() {
    if (!resident_) return;
    for_resident([&]<int tile>(std::integral_constant<int, tile>) {
      amx_store<tile>(resident_->sums + tile * kTileFloats, kAmxRowBytes);
    });
    if constexpr (kTiles > kResident) add_other_columns();
    resident_ = nullptr;
  }
  // Columns that found no registers take the values of all chunks at once.
  void add_other_columns() const {
    float* sums = resident_->sums + kResident * kTileFloats;
    const auto for_others = [&](const auto& body) {
      for_resident([&]<int tile>(std::integral_constant<int, tile> i) {
        if constexpr (tile < kTiles - kResident) body(i);
      });
    };
    for_others(
        [&]<int tile>(std::integral_constant<int, tile>) { amx_load<tile>(sums + tile * kTileFloats, kAmxRowBytes); });
    for (int64_t n = 0; n < resident_chunks_.count(); ++n) {
      const bf16* values = resident_values_ + n * kChunkHalves + kResident * kTileHalves;
      amx_load<7>(resident_weights_ + n * kTileHalves, kAmxRowBytes);
      for_others([&]<int tile>(std::integral_constant<int, tile>) {
        amx_load<6>(values + tile * kTileHalves, kAmxRowBytes);
        amx_multiply_tiles<tile, 6, 7>();
      });
    }
    for_others(
        [&]<int tile>(std::integral_constant<int, tile>) { amx_store<tile>(sums + tile * kTileFloats, kAmxRowBytes); });
  }

  void write(const Unit& unit) const {
    const F total = load(unit.total), reference = load(unit.reference);
    const I none = total == F{}, infinite = total == INFINITY;
    // lse = reference ln 2 + log(total), the first in two floats and the sum's rounding error beside it
    const F first = reference * 0.693147182f;
    const F rest = fused(reference, 0.693147182f, first) + reference * -1.90465421e-9f;
    const F log = log_of_normal(select(none | infinite, broadcast(1.0f), total)), lse = first + log;
    const F error = (first - (lse - (lse - first))) + (log - (lse - first));
    alignas(64) float high[kUnitRows], low[kUnitRows];
    store(high, select(none, broadcast(-INFINITY), select(infinite, total, lse)));
    store(low, select(none | infinite | (lse - lse != F{}), F{}, error + rest));
    const int64_t statistic = (s_.batch * p_.heads() + unit.head) * p_.query.size(2) + s_.row0 + unit.row;
    std::copy_n(high, unit.rows, p_.lse.as<float>() + statistic);
    std::copy_n(low, unit.rows, p_.lse_low.as<float>() + statistic);
    const F factor = select(none, F{}, 1.0f / total);
    const Rows<bf16> to(p_.output, s_.batch, unit.head, s_.row0 + unit.row);
    for_lanes(to.columns, [&](int64_t c, auto n) {
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(unit.sums + (c + i) * kLanes) * factor;
      transpose(block);
      for (int64_t i = 0; i < unit.rows; ++i) store_n(to.row(i) + c, block[i], n);
    });
  }

  const ops::AttentionForward& p_;
  const ops::Sequence& s_;
  ops::Band band_;
  float factor_;
  Rows<const bf16> key_, value_;
  std::vector<Unit> units_;
  bf16 *block_, *weights_;
  float* scores_;
  int64_t parity_ = 0, even_ = 0;
  Place places_[3];
  int turn_ = 0;
  Place *now_ = nullptr, *last_ = nullptr;
  Unit* resident_ = nullptr;
  Span resident_chunks_{};
  const bf16 *resident_values_ = nullptr, *resident_weights_ = nullptr;
};

template <int kSteps>
void amx_forward(const ops::AttentionForward& p) {
  using Task = AmxForward<kSteps>;
  const std::vector<ops::Sequence> sequences = ops::sequences_of(p);
  int64_t all = 0;
  for (const ops::Sequence& s : sequences) all += p.key_heads() * Task::units(p, s);
  // Units that go together share the packing of keys and values, and lie in the second-level cache beside a block.
  constexpr int64_t kMost = (int64_t{400} << 8) / Task::kUnitFloats;
  const int64_t together = std::clamp<int64_t>(all / (4 * num_threads()), 1, kMost);
  const auto chunks = [&](const ops::Sequence& s) { return count_of(Task::units(p, s), together); };
  const SequenceTasks tasks(sequences, [&](size_t s) { return p.key_heads() * chunks(sequences[s]); });
  parallel_each(tasks.size(), [&](int64_t index) {
    const auto [s, which, number] = tasks[index];
    const int64_t first = number / p.key_heads() * together;
    Task(p, s, number % p.key_heads(), {first, std::min(first + together, Task::units(p, s))}).run();
  });
}

inline void amx_forward(const ops::AttentionForward& p) {
  amx_steps(p, [&]<int steps>(std::integral_constant<int, steps>) { amx_forward<steps>(p); });
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
#endif
