// Products of small bf16 tiles that lie in a core's own caches, summed in float, for processors that multiply pairs of
// bf16: AVX512-BF16 (vdpbf16ps) and AMX (tdpbf16ps). The float counterpart is cpu/tile_gemm.h.
//
//   C(row, column) = sum_k A(row, k) B(k, column), placed into, added to or scaled with what C holds (Into)
//
//   A    rows of bf16: element (row, k) at a[row a_stride + k]
//   B    panels of kPairPanel columns in which rows 2 i and 2 i + 1 are interleaved, so that a 32-bit lane holds two
//        consecutive k of a column: element (k, column) of a panel at b[(k / 2) 2 kPairPanel + 2 column + k % 2]
//   C    float
//
//   Depths are multiples of kPairDepth (the packers below pad both operands with zeros). A's rows are readable,
//   whatever they hold, up to a multiple of kPairRows; C's columns writable up to whole vectors.
//
//   One lane of B meets a broadcast pair of A: 6 x 4 accumulators, and 10 loads for 24 instructions of 64 flops each;
//   on AMX 2 x 2 tiles of 16 x 16, and 4 loads for 4 instructions of 16 Kiflop. Both round to nearest whatever the
//   mode, and take denormals (bf16 or float, below 1.2e-38) for zero; NaN and infinity are as ever. Without such
//   instructions the pairs are widened and multiplied as floats: right, but no faster than floats.
#pragma once

#include "cpu/amx.h"
#include "cpu/tile_gemm.h"

namespace llmengine::cpu::LLMENGINE_ISA {

#if defined(LLMENGINE_AMX)
inline constexpr bool kAmx = true;
inline constexpr int kPairRows = kAmxRows, kPairDepth = kAmxRowBytes / 2, kPairVectors = 2;
#else
inline constexpr bool kAmx = false;
inline constexpr int kPairRows = kTileRows, kPairDepth = 2, kPairVectors = kTileVectors;
#endif
inline constexpr int kPairPanel = kPairVectors * kLanes;  // columns

#if defined(__AVX512BF16__) || defined(LLMENGINE_AMX)
inline constexpr bool kPairsPay = true;  // bf16 operands are best multiplied here
#else
inline constexpr bool kPairsPay = false;
#endif

constexpr int64_t pair_depth(int64_t depth) { return round_up(depth, kPairDepth); }
constexpr int64_t pair_panel_size(int64_t depth) { return pair_depth(depth) * kPairPanel; }  // in bf16

// Lives on a thread around its calls of multiply_pairs: AMX's tiles are configured for so long. For a task, not for
// every small product.
struct PairSession {
#if defined(LLMENGINE_AMX)
  PairSession() { amx_configure(); }
  ~PairSession() { amx_release(); }
#else
  PairSession() {}
#endif
  PairSession(const PairSession&) = delete;
  PairSession& operator=(const PairSession&) = delete;
};

// ---- multiplication -------------------------------------------------------------------------------------------------

inline U load_pairs(const bf16* p) {
  U pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return pairs;
}
inline void store_pairs(bf16* p, U pairs) { std::memcpy(p, &pairs, sizeof pairs); }
inline U broadcast_pair(const bf16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return U{} + pair;
}

// sum + both products of the pairs in each lane
inline F add_products(F sum, U a, U b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
#else
  const auto even = [](U pairs) { return __builtin_bit_cast(F, pairs << 16); };
  const auto odd = [](U pairs) { return __builtin_bit_cast(F, pairs & 0xffff0000); };
  return (sum + even(a) * even(b)) + odd(a) * odd(b);
#endif
}

#if defined(LLMENGINE_AMX)

// What a product asks memory for while its tiles multiply: `lines` lines from there on at each step of its depth.
struct Ahead {
  const char* from = nullptr;
  int lines = 0;

  void ask(int64_t step) const {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(from + (step * lines + i) * 64, 0, 2);  // to the second level
  }
};

// Row_tiles x column_tiles tiles of C, all of which is read (where it is added to) and written.
template <int row_tiles, int column_tiles, bool add>
inline void multiply_amx(int64_t depth, const bf16* a, int64_t a_stride, const bf16* b, float* c, int64_t c_stride,
                         Ahead ahead = {}) {
  const auto each_c = [&](const auto& body) {
    body.template operator()<0>(c);
    if constexpr (column_tiles == 2) body.template operator()<1>(c + kLanes);
    if constexpr (row_tiles == 2) body.template operator()<2>(c + kAmxRows * c_stride);
    if constexpr (row_tiles == 2 && column_tiles == 2) body.template operator()<3>(c + kAmxRows * c_stride + kLanes);
  };
  each_c([&]<int tile>(const float* at) {
    if constexpr (add) {
      amx_load<tile>(at, 4 * c_stride);
    } else {
      amx_zero<tile>();
    }
  });
  for (int64_t k = 0; k < depth; k += kPairDepth) {
    const bf16* panel = b + k * kPairPanel;
    amx_load<kAmxA>(a + k, 2 * a_stride);
    amx_load<kAmxB>(panel, 4 * kPairPanel);
    ahead.ask(k / kPairDepth);
    amx_multiply<0, 0>();
    if constexpr (row_tiles == 2) {
      amx_load<kAmxA + 1>(a + kAmxRows * a_stride + k, 2 * a_stride);
      amx_multiply<1, 0>();
    }
    if constexpr (column_tiles == 2) {
      amx_load<kAmxB + 1>(panel + 2 * kLanes, 4 * kPairPanel);
      amx_multiply<0, 1>();
      if constexpr (row_tiles == 2) amx_multiply<1, 1>();
    }
  }
  each_c([&]<int tile>(float* at) { amx_store<tile>(at, 4 * c_stride); });
}

inline constexpr int kStripeRows = 2 * kAmxRows;

// At most kStripeRows rows and a panel of C. Where tiles cannot bring their sums into C by themselves (its last rows
// are no whole tile, or it is scaled), they go through a block on the stack.
template <Into into>
inline void multiply_stripe(int vectors, int rows, int64_t depth, const bf16* a, int64_t a_stride, const bf16* b,
                            float* c, int64_t c_stride, const float* beta, Ahead ahead = {}) {
  const auto run = [&]<bool add>(std::bool_constant<add>, float* to, int64_t stride) {
    const auto multiply = rows > kAmxRows ? (vectors == 2 ? multiply_amx<2, 2, add> : multiply_amx<2, 1, add>)
                                          : (vectors == 2 ? multiply_amx<1, 2, add> : multiply_amx<1, 1, add>);
    multiply(depth, a, a_stride, b, to, stride, ahead);
  };
  if constexpr (into == Into::place || into == Into::add) {
    if (rows % kAmxRows == 0) return run(std::bool_constant<into == Into::add>(), c, c_stride);
  }
  alignas(64) float products[kStripeRows][kPairPanel];
  run(std::false_type(), products[0], kPairPanel);
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      float* out = c + r * c_stride + v * kLanes;
      store(out, brought_into<into>(out, load(products[r] + v * kLanes), r, beta));
    }
  }
}

#else

inline constexpr int kStripeRows = kTileRows;

template <int kVectors, Into into>
inline void multiply_stripe(int rows, int64_t depth, const bf16* a, int64_t a_stride, const bf16* b, float* c,
                            int64_t c_stride, const float* beta) {
  F sum[kTileRows][kVectors] = {};
  for (int64_t k = 0; k < depth; k += 2) {
    U line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) line[v] = load_pairs(b + k * kPairPanel + 2 * v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const U x = broadcast_pair(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = add_products(sum[r][v], x, line[v]);
    }
  }
  store_tile<into>(sum, rows, c, c_stride, beta);
}

template <Into into>
inline void multiply_stripe(int vectors, int rows, int64_t depth, const bf16* a, int64_t a_stride, const bf16* b,
                            float* c, int64_t c_stride, const float* beta) {
  switch (vectors) {
    case 1: return multiply_stripe<1, into>(rows, depth, a, a_stride, b, c, c_stride, beta);
    case 2: return multiply_stripe<2, into>(rows, depth, a, a_stride, b, c, c_stride, beta);
#if LLMENGINE_LANES == 16
    case 3: return multiply_stripe<3, into>(rows, depth, a, a_stride, b, c, c_stride, beta);
    case 4: return multiply_stripe<4, into>(rows, depth, a, a_stride, b, c, c_stride, beta);
#endif
  }
}

#endif

#if defined(LLMENGINE_AMX)
// C (rows, vectors kLanes) beside one panel of B, while memory is asked for the panel at `next`, if there is one.
template <Into into>
inline void multiply_panel(int64_t rows, int vectors, int64_t depth, const bf16* a, int64_t a_stride, const bf16* b,
                           float* c, int64_t c_stride, const bf16* next) {
  const int64_t stripes = (rows + kStripeRows - 1) / kStripeRows, steps = depth / kPairDepth;
  const int64_t lines = depth * kPairPanel * 2 / 64, share = (lines + stripes * steps - 1) / (stripes * steps);
  for (int64_t i = 0; i < stripes; ++i) {
    const int64_t r = i * kStripeRows;
    Ahead ahead;
    if (next) ahead = {reinterpret_cast<const char*>(next) + i * share * steps * 64, static_cast<int>(share)};
    multiply_stripe<into>(vectors, static_cast<int>(rows - r < kStripeRows ? rows - r : kStripeRows), depth,
                          a + r * a_stride, a_stride, b, c + r * c_stride, c_stride, nullptr, ahead);
  }
}
#endif

// C (rows, vectors kLanes), a panel of columns after another, each `panel_stride` bf16 behind the one before; within
// the life of a PairSession. beta as Into has it: one factor, or one a row.
template <Into into>
inline void multiply_pairs(int64_t rows, int64_t vectors, int64_t depth, const bf16* a, int64_t a_stride, const bf16* b,
                           int64_t panel_stride, float* c, int64_t c_stride, const float* beta = nullptr) {
  for (int64_t v = 0; v < vectors; v += kPairVectors, b += panel_stride) {
    const int width = static_cast<int>(vectors - v < kPairVectors ? vectors - v : kPairVectors);
    for (int64_t r = 0; r < rows; r += kStripeRows) {
      const int count = static_cast<int>(rows - r < kStripeRows ? rows - r : kStripeRows);
      multiply_stripe<into>(width, count, depth, a + r * a_stride, a_stride, b, c + r * c_stride + v * kLanes, c_stride,
                            into == Into::scaled ? beta + r : beta);
    }
  }
}

// ---- packing --------------------------------------------------------------------------------------------------------
//
// From bf16, or from float rounded to nearest even (float denormals may become zero, as the products take them).

inline U halves(const bf16* p) {  // kLanes elements, as the lower halves of lanes
  H h;
  std::memcpy(&h, p, sizeof h);
  return zero_extend(h);
}
inline U halves(const float* p) {
#if defined(__AVX512BF16__)
  return zero_extend(__builtin_bit_cast(H, _mm512_cvtneps_pbh(load(p))));
#else
  bf16 rounded[kLanes];
  store(rounded, load(p));
  return halves(rounded);
#endif
}

// 2 kLanes consecutive elements, and the first n of them with zeros behind
inline U consecutive(const bf16* p) { return load_pairs(p); }
inline U consecutive(const float* p) {
#if defined(__AVX512BF16__)
  return __builtin_bit_cast(U, _mm512_cvtne2ps_pbh(load(p + kLanes), load(p)));
#else
  bf16 rounded[2 * kLanes];
  store(rounded, load(p));
  store(rounded + kLanes, load(p + kLanes));
  return load_pairs(rounded);
#endif
}
template <class T>
inline U consecutive(const T* p, int64_t n) {
  if (n >= 2 * kLanes) return consecutive(p);
  bf16 some[2 * kLanes] = {};
  for (int64_t i = 0; i < n; ++i) narrow(widen(p[i]), some + i);
  return load_pairs(some);
}
// Likewise of kLanes.
template <class T>
inline U halves(const T* p, int64_t n) {
  if (n >= kLanes) return halves(p);
  bf16 some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) narrow(widen(p[i]), some + i);
  return halves(some);
}

inline void transpose(U (&x)[kLanes]) {
  F moved[kLanes];
  std::memcpy(moved, x, sizeof x);
  transpose(moved);
  std::memcpy(x, moved, sizeof x);
}

// A row of A, `depth` long; zeros up to pair_depth(depth).
template <class T>
inline void pack_line(const T* from, int64_t depth, bf16* to) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= depth; k += 2 * kLanes) store_pairs(to + k, consecutive(from + k));
  for (const int64_t end = pair_depth(depth); k < end; ++k) narrow(k < depth ? widen(from[k]) : 0.0f, to + k);
}

// Rows of an A that lies transposed, element (row, k) at from[k stride + row]. Writes rows of round_up(depth, 2
// kLanes). Lines of memory are read along, 2 kLanes at a time: as many pages.
template <class T>
inline void pack_lines_transposed(const T* from, int64_t stride, int64_t rows, int64_t depth, bf16* to,
                                  int64_t to_stride) {
  for (int64_t k = 0; k < depth; k += 2 * kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t count = rows - r < kLanes ? rows - r : kLanes;
      const auto line = [&](int64_t i) { return i < depth ? halves(from + i * stride + r, count) : U{}; };
      U block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = line(k + 2 * i) | line(k + 2 * i + 1) << 16;
      transpose(block);
      for (int64_t i = 0; i < count; ++i) store_pairs(to + (r + i) * to_stride + k, block[i]);
    }
  }
}

// Two consecutive rows of B, interleaved, into their places in every panel; `to` is that in the first. odd: null behind
// the last row.
template <class T>
inline void pack_pair(const T* even, const T* odd, int64_t columns, bf16* to, int64_t panel_stride) {
  for (int64_t panel = 0; panel < columns; panel += kPairPanel, to += panel_stride) {
    for (int64_t c = panel; c < columns && c < panel + kPairPanel; c += kLanes) {
      const int64_t n = columns - c;
      store_pairs(to + 2 * (c - panel), halves(even + c, n) | (odd ? halves(odd + c, n) << 16 : U{}));
    }
  }
}

// B, element (k, column) at line(k)[column]; panels pair_panel_size(depth) apart. Columns up to a multiple of kLanes
// become zero, and rows up to pair_depth(depth).
template <class T, class Line>
inline void pack_pairs_by(const Line& line, int64_t depth, int64_t columns, bf16* to) {
  for (int64_t k = 0; k < pair_depth(depth); k += 2, to += 2 * kPairPanel) {
    if (k < depth) {
      pack_pair<T>(line(k), k + 1 < depth ? line(k + 1) : nullptr, columns, to, pair_panel_size(depth));
    } else {
      for (int64_t c = 0; c < columns; c += kPairPanel) {
        std::memset(to + c / kPairPanel * pair_panel_size(depth), 0, 2 * kPairPanel * sizeof(bf16));
      }
    }
  }
}
template <class T>
inline void pack_pairs(const T* from, int64_t stride, int64_t depth, int64_t columns, bf16* to) {
  pack_pairs_by<T>([&](int64_t k) { return from + k * stride; }, depth, columns, to);
}

// The same of a B that lies transposed, element (k, column) at from[column stride + k].
template <class T>
inline void pack_pairs_transposed(const T* from, int64_t stride, int64_t columns, int64_t depth, bf16* to) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    bf16* panel = to + c / kPairPanel * pair_panel_size(depth) + 2 * (c % kPairPanel);
    const int64_t count = columns - c < kLanes ? columns - c : kLanes;
    for (int64_t k = 0; k < depth; k += 2 * kLanes) {
      U block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = i < count ? consecutive(from + (c + i) * stride + k, depth - k) : U{};
      transpose(block);
      const int64_t pairs = (pair_depth(depth) - k) / 2;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < pairs) store_pairs(panel + (k / 2 + i) * 2 * kPairPanel, block[i]);
      }
    }
  }
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
