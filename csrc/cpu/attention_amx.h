// Attention of bf16 on AMX's tiles: the forward (formulas: ops/attention.h; masks, biases, dropout:
// cpu/attention_amx_logits.h).
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
//   Chunks in which a unit sees nothing are left out.
//
//   Where logits are more than products times a factor, they are made of S before its exponentials, and m, now a logit
//   itself and no multiple of one, is told in advance when they have grown beyond it by 1.5. Dropout takes weights from
//   P after they were summed.
//
//   Limit: the port that multiplies, 8.5 instructions a vector of scores, while the tiles take 4 of those cycles at
//   head_dim 64.
#pragma once

#include "cpu/attention_amx_logits.h"
#include "cpu/attention_amx_pack.h"

#if defined(LLMENGINE_AMX)

namespace llmengine::cpu::LLMENGINE_ISA {

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

// 2^x within 2e-7; 1 at 0, 0 at -inf.
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

// Two vectors of floats, rounded to bf16 (halves away from 0) and interleaved. A NaN stays one where its lower half is
// zero, as it is in what tiles make of bf16; whatever else comes in has to see to it.
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
// What a unit's scores are, and how they become weights:
//   all      products, 2^(factor product - shift)
//   some     the same, but only those are seen that have a bit
//   logits   2^(factor (logit - shift)); of those that have no bit the sum knows, and the values do not
enum class AmxSees { all, some, logits };
struct AmxWeights {
  F factor, shift;
  U bits;
};

// Makes the scores of `next`, the weights of `now`, whose sums it returns, and adds the values of `last` to tiles 0 to
// kResident - 1.
template <int kSteps, int kResident, AmxSees sees, bool has_next, bool has_last>
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
  const U bits = weights.bits;
  F sums[kKeys] = {};
  const auto group = [&]<int g>(std::integral_constant<int, g>) __attribute__((always_inline)) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      (act(std::integral_constant<int, g * kActions / kGroups + i>()), ...);
    }(std::make_integer_sequence<int, (g + 1) * kActions / kGroups - g * kActions / kGroups>());
    F p[kKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const int key = g * kKeys + i;
      const F score = load(now.scores + key * kLanes);
      p[i] = power_of_2(sees == AmxSees::logits ? (score - shift) * factor : score * factor - shift);
      if constexpr (sees == AmxSees::some) p[i] = select(has_bit(bits, key), p[i], F{});
      sums[i] += p[i];
      if constexpr (sees == AmxSees::logits) p[i] = select(has_bit(bits, key), p[i], F{});
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

// ---- the forward ----------------------------------------------------------------------------------------------------

inline bool amx_takes(const ops::AttentionOptions& p) {
  return p.query.dtype == DType::bf16 && std::max(p.query.size(3), p.value.size(3)) <= 8 * 2 * kLanes;
}

// Calls body with the number of products that head_dim and value_dim take, or with a little more.
template <class Body>
void amx_steps(const ops::AttentionOptions& p, const Body& body) {
  switch (count_of(std::max(p.query.size(3), p.value.size(3)), 2 * kLanes)) {
    case 0:
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 5:
    case 6: return body(std::integral_constant<int, 6>());
    default: return body(std::integral_constant<int, 8>());
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
        plain_(AmxLogits::plain(p)),
        factor_(plain_ ? static_cast<float>(p.scale * 1.4426950408889634) : 1.44269504f),
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
    AmxLogits logits;
    Span seen{}, full{};               // from the first to the last key that some row may see, and those that all see
    bool ready = false, open = false;  // query is packed; some row has no reference yet
    float *sums = nullptr, *reference = nullptr, *total = nullptr;
    bf16* query = nullptr;

    AmxPiece piece(int64_t key) const { return {row, rows, key}; }
  };
  struct Place {  // a chunk for a unit
    Unit* unit = nullptr;
    int64_t key = 0, chunk = 0;
    bool hides = false;
    U seen{};  // where it hides some
    AmxChunk at{};
  };

  void add_unit(int64_t n, int64_t key_head, float* memory) {
    const int64_t group = p_.group(), row = (count_of(s_.rows, kUnitRows) - 1 - n / group) * kUnitRows;
    const int64_t head = key_head * group + n % group;
    Unit unit{head, row, std::min<int64_t>(kUnitRows, s_.rows - row), AmxLogits(p_, s_, head)};
    const auto keys = band_.keys_of(row, row + unit.rows);
    unit.seen = common({keys.begin, keys.end}, unit.logits.keys());
    if (!unit.logits.masked()) unit.full = {keys.full, keys.full_end};
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
    unit.open = true;
    store(unit.reference, broadcast(-INFINITY));
    store(unit.total, F{});
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
    const AmxPiece piece = unit.piece(first + chunk * kChunkKeys);
    next.hides = piece.key < unit.full.begin || piece.key + kChunkKeys > unit.full.end;
    if (next.hides) {
      next.seen = unit.logits.seen(piece);
      if (all(next.seen == 0)) return;
      next.hides = !all(next.seen == ~U{});
    }
    turn_ = turn_ == 2 ? 0 : turn_ + 1, even_ ^= 1;
    if (!now_ || now_->unit != &unit) parity_ ^= 1;
    const bf16* keys = block_ + chunk * kChunkHalves;
    next.unit = &unit, next.key = piece.key, next.chunk = chunk;
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
    AmxWeights weights{broadcast(factor_), {}, now_->seen};
    if (!plain_) {
      weights.bits = make_logits();
    } else if (unit.open) {
      refer();
    }
    const F reference = load(unit.reference);
    weights.shift = select(reference == -INFINITY, F{}, reference);
    const F sums = !plain_       ? step<AmxSees::logits, has_next>(next, weights)
                   : now_->hides ? step<AmxSees::some, has_next>(next, weights)
                                 : step<AmxSees::all, has_next>(next, weights);
    if (!plain_ || all(sums < kMost)) {
      store(unit.total, load(unit.total) + sums);
    } else {
      redo(sums < kMost);
    }
    last_ = now_;
  }
  template <AmxSees sees, bool has_next>
  F step(const Place& next, const AmxWeights& weights) {
    if (!last_) return amx_step<kSteps, kResident, sees, has_next, false>(next.at, now_->at, weights, now_->at);
    make_resident(*last_);
    return amx_step<kSteps, kResident, sees, has_next, true>(next.at, now_->at, weights, last_->at);
  }

  // ---- logits that are more than products ----

  // Makes them of the present products, and returns what dropout keeps of their weights. Rows whose logits have grown
  // far beyond their reference refer to the greatest.
  U make_logits() {
    Unit& unit = *now_->unit;
    const AmxPiece piece = unit.piece(now_->key);
    unit.logits.make(piece, now_->hides ? now_->seen : ~U{}, now_->at.scores, kTileFloats);
    const F before = load(unit.reference),
            most = largest([&](int key) { return load(now_->at.scores + key * kLanes); });
    const I outgrown = most > before + 1.5f;
    if (!all(~outgrown)) {
      if (last_) make_resident(*last_), add_values(last_->at);  // by what they were weighed with
      if (resident_ == &unit) evict();
      last_ = nullptr;
      rescale(unit, select(outgrown, most, before),
              select(outgrown, power_of_2((before - most) * factor_), broadcast(1.0f)));
    }
    return unit.logits.drops() ? unit.logits.kept(piece) : ~U{};
  }

  // Of sums that are not resident.
  void rescale(Unit& unit, F reference, F scale) const {
    store(unit.reference, reference);
    store(unit.total, load(unit.total) * scale);
    for (int64_t i = 0; i < kTiles * kTileFloats; i += kLanes) store(unit.sums + i, load(unit.sums + i) * scale);
  }

  // ---- products alone ----

  // Weights beyond it make their row choose another reference.
  static constexpr float kMost = 1099511627776.0f;

  // Rows that see their first keys refer to the greatest of their logits.
  void refer() const {
    Unit& unit = *now_->unit;
    const F before = load(unit.reference);
    store(unit.reference, select(before == -INFINITY, largest_product() * factor_, before));
    unit.open = !all(load(unit.reference) > -INFINITY);
  }

  F product(int key) const {
    const F x = load(now_->at.scores + key * kLanes);
    return now_->hides ? select(has_bit(now_->seen, key), x, broadcast(-INFINITY)) : x;
  }
  F largest_product() const {
    return largest([&](int key) { return product(key); });
  }
  template <class Score>
  static F largest(const Score& score) {
    F most[4];
    for (F& m : most) m = broadcast(-INFINITY);
    for (int key = 0; key < kChunkKeys; key += 4) {
      for (int i = 0; i < 4; ++i) most[i] = max(most[i], score(key + i));
    }
    return max(max(most[0], most[1]), max(most[2], most[3]));
  }

  // The present weights once more, and what is infinite or no number as such. Rows that are not calm refer to their
  // greatest logit so far; the others get what they had, bit by bit.
  void redo(I calm) {
    Unit& unit = *now_->unit;
    if (resident_ == &unit) evict();
    const F before = load(unit.reference), most = select(calm, before, max(before, largest_product() * factor_));
    const F shift = select(most == -INFINITY, F{}, most);
    F sums[4] = {};
    for (int key = 0; key < kChunkKeys; key += 2) {
      F p[2];
      for (int i = 0; i < 2; ++i) {
        p[i] = product(key + i) * factor_ - shift;
        p[i] = select(p[i] == -INFINITY, F{}, power_of_2(p[i]));
        sums[(key + i) % 4] += p[i];
      }
      store_pairs(now_->at.weights + key * kLanes, interleaved(p[0], p[1]));
    }
    rescale(unit, most, select(before == -INFINITY, F{}, power_of_2(before - shift)));
    store(unit.total, load(unit.total) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
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

  // The sums of a chunk's unit come into registers; those of another one leave, and so do those whose chunks end here:
  // columns that wait for their values take chunks that follow each other.
  void make_resident(const Place& chunk) {
    if (resident_ != chunk.unit || resident_chunks_.end != chunk.chunk) {
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
    add_other_columns();
    resident_ = nullptr;
  }
  // Columns that found no registers take the values of all chunks at once, as many tiles as there are registers.
  template <int first = kResident>
  void add_other_columns() const {
    if constexpr (first < kTiles) {
      float* sums = resident_->sums + first * kTileFloats;
      const auto for_some = [](const auto& body) {
        for_resident([&]<int tile>(std::integral_constant<int, tile> i) {
          if constexpr (first + tile < kTiles) body(i);
        });
      };
      for_some([&]<int tile>(std::integral_constant<int, tile>) {
        amx_load<tile>(sums + tile * kTileFloats, kAmxRowBytes);
      });
      for (int64_t n = 0; n < resident_chunks_.count(); ++n) {
        const bf16* values = resident_values_ + n * kChunkHalves + first * kTileHalves;
        amx_load<7>(resident_weights_ + n * kTileHalves, kAmxRowBytes);
        for_some([&]<int tile>(std::integral_constant<int, tile>) {
          amx_load<6>(values + tile * kTileHalves, kAmxRowBytes);
          amx_multiply_tiles<tile, 6, 7>();
        });
      }
      for_some([&]<int tile>(std::integral_constant<int, tile>) {
        amx_store<tile>(sums + tile * kTileFloats, kAmxRowBytes);
      });
      add_other_columns<first + kResident>();
    }
  }

  void write(const Unit& unit) const {
    // lse = reference + log(total), the first in two floats (a product's is a logit over ln 2) and the sum's rounding
    // error beside it
    const F reference = load(unit.reference);
    F first = plain_ ? reference * 0.693147182f : reference, total = load(unit.total), scale = broadcast(1.0f);
    F rest = plain_ ? fused(reference, 0.693147182f, first) + reference * -1.90465421e-9f : F{};
    if (const float sink = p_.sink(s_, unit.head); sink != -INFINITY) {  // the last logit
      rest = select(first == -INFINITY, F{}, rest);
      const F beyond = (sink - first) - rest;
      const I highest = sink > first;
      scale = select(highest, exp_of_nonpositive(-beyond), scale);
      total = total * scale + select(highest, broadcast(1.0f), exp_of_nonpositive(beyond));
      first = select(highest, broadcast(sink), first), rest = select(highest, F{}, rest);
    }
    const I none = total == F{}, infinite = total == INFINITY;
    const F log = log_of_normal(select(none | infinite, broadcast(1.0f), total)), lse = first + log;
    const F error = (first - (lse - (lse - first))) + (log - (lse - first));
    alignas(64) float high[kUnitRows], low[kUnitRows];
    store(high, select(none, broadcast(-INFINITY), select(infinite, total, lse)));
    store(low, select(none | infinite | (lse - lse != F{}), F{}, error + rest));
    const int64_t statistic = (s_.batch * p_.heads() + unit.head) * p_.query.size(2) + s_.row0 + unit.row;
    std::copy_n(high, unit.rows, p_.lse.as<float>() + statistic);
    std::copy_n(low, unit.rows, p_.lse_low.as<float>() + statistic);
    const F factor = select(none, F{}, scale * unit.logits.keep_scale() / total);
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
  bool plain_;  // see AmxLogits
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
