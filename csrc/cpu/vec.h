// The vector type of the CPU kernels: kLanes floats, in the compiler's own vector extension, so that one source serves
// every instruction set (and Arm), without intrinsics but for a conversion and the square root. Included by kernel
// files only, which the build compiles once per set.
//
// Everything here lives in the instruction set's own namespace: were two sets to share a function, the linker would
// keep one of the two copies for both.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/tensor.h"
#include "cpu/isa.h"

namespace llmengine::cpu::LLMENGINE_ISA {

#if defined(__AVX512F__) || defined(LLMENGINE_AMX_EMULATED)
#define LLMENGINE_LANES 16
#elif defined(__AVX2__)
#define LLMENGINE_LANES 8
#else
#define LLMENGINE_LANES 4
#endif
inline constexpr int kLanes = LLMENGINE_LANES;

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

// x - 0, which is x for every x: the compiler drops it, as it may not drop 0 + x (-0 + 0 is +0).
inline F broadcast(float x) { return x - F{}; }
inline F to_float(I x) { return __builtin_convertvector(x, F); }
inline I bits(F x) { return __builtin_bit_cast(I, x); }
inline F from_bits(I x) { return __builtin_bit_cast(F, x); }
inline F select(I condition, F yes, F no) { return condition ? yes : no; }
// NaN in `a` stays: a comparison with NaN is false.
inline F max(F a, F b) { return a < b ? b : a; }
inline F min(F a, F b) { return a > b ? b : a; }

// Correctly rounded; NaN below 0.
inline F sqrt(F x) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F, _mm512_maskz_sqrt_ps(0xffff, __builtin_bit_cast(__m512, x)));
#elif defined(__AVX2__)
  return __builtin_bit_cast(F, _mm256_sqrt_ps(__builtin_bit_cast(__m256, x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

inline float sum(F x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float reduce_max(F x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i + width] : lanes[i];
  }
  return lanes[0];
}

// ---- words: what the random generator is made of ----

inline U lane_numbers() {
  U numbers;
  for (uint32_t i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

struct Product {
  U low, high;
};

// The 64-bit products of 32-bit words. Processors multiply every second lane: GCC does not see it in portable code.
inline Product multiply(U a, uint32_t b) {
#if defined(__AVX2__)
  typedef uint64_t W __attribute__((vector_size(4 * kLanes)));
#if defined(__AVX512F__)
  const auto times_b = [y = _mm512_set1_epi32(static_cast<int>(b))](W x) {
    return __builtin_bit_cast(W, _mm512_maskz_mul_epu32(0xff, __builtin_bit_cast(__m512i, x), y));
  };
#else
  const auto times_b = [y = _mm256_set1_epi32(static_cast<int>(b))](W x) {
    return __builtin_bit_cast(W, _mm256_mul_epu32(__builtin_bit_cast(__m256i, x), y));
  };
#endif
  const W x = __builtin_bit_cast(W, a), even = times_b(x), odd = times_b(x >> 32);
  const I second = -(__builtin_bit_cast(I, lane_numbers()) & 1);
  return {second ? __builtin_bit_cast(U, odd << 32) : __builtin_bit_cast(U, even),
          second ? __builtin_bit_cast(U, odd) : __builtin_bit_cast(U, even >> 32)};
#else
  Product product;
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t wide = static_cast<uint64_t>(a[i]) * b;
    product.low[i] = static_cast<uint32_t>(wide);
    product.high[i] = static_cast<uint32_t>(wide >> 32);
  }
  return product;
#endif
}

// The lanes of these numbers, b's counted from kLanes on. They are constants when parsed: GCC lowers a shuffle by
// anything else to memory before it unrolls a loop. GCC learnt Clang's word for it in its version 12 only.
template <int... lane, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  constexpr I order = {lane...};
  return __builtin_shuffle(a, b, order);
#endif
}
using Lanes = std::make_integer_sequence<int, kLanes>;

struct Pair {
  U first, second;
};

// a0 b0 a1 b1 ..., in two vectors.
template <int... lane>
inline Pair zip(U a, U b, std::integer_sequence<int, lane...>) {
  return {shuffle<(lane / 2 + lane % 2 * kLanes)...>(a, b),
          shuffle<(kLanes / 2 + lane / 2 + lane % 2 * kLanes)...>(a, b)};
}
inline Pair zip(U a, U b) { return zip(a, b, Lanes()); }

// ---- element types: float and bf16; arithmetic is always float ----

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// An intrinsic, as GCC makes three shuffles of this conversion where the machine has an instruction.
inline U zero_extend(H h) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(U, _mm512_maskz_cvtepu16_epi32(0xffff, __builtin_bit_cast(__m256i, h)));
#elif defined(__AVX2__)
  return __builtin_bit_cast(U, _mm256_cvtepu16_epi32(__builtin_bit_cast(__m128i, h)));
#else
  return __builtin_convertvector(h, U);
#endif
}
inline F load(const bf16* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_bit_cast(F, zero_extend(h) << 16);
}

inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, F v) {
#if defined(__AVX512BF16__)
  // The instruction takes denormals for zero, and a NaN for another: those come below.
  constexpr int kNanOrDenormal = 0x01 | 0x20 | 0x80;
  if (__builtin_expect(!_mm512_fpclass_ps_mask(v, kNanOrDenormal), 1)) {
    const __m256bh h = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &h, sizeof h);
    return;
  }
#endif
  const U u = __builtin_bit_cast(U, v);
  const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const U nan = U{} + 0x7fc0;
  const H h = __builtin_convertvector((v != v) ? nan : rounded, H);
  std::memcpy(p, &h, sizeof h);
}

// The first n < kLanes elements; the other lanes are `fill`.
template <class T>
inline F load_part(const T* p, int64_t n, float fill = 0.0f) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? widen(p[i]) : fill;
  return load(lanes);
}
template <class T>
inline void store_part(T* p, F v, int64_t n) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) narrow(lanes[i], p + i);
}

// Calls body(offset, count) over [0, n) in steps of kLanes; only the last count may be smaller.
template <class Body>
inline void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, std::integral_constant<int, kLanes>{});
  if (i < n) body(i, static_cast<int>(n - i));
}
// As for_lanes, for reductions: body(offset, count, k) with k cycling through 0..3, so that a body with one accumulator
// for each k keeps four sums in flight where a single one would wait for its own last addition.
template <class Body>
inline void for_lanes_by_4(int64_t n, const Body& body) {
  constexpr std::integral_constant<int, kLanes> full{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    body(i, full, std::integral_constant<int, 0>{});
    body(i + kLanes, full, std::integral_constant<int, 1>{});
    body(i + 2 * kLanes, full, std::integral_constant<int, 2>{});
    body(i + 3 * kLanes, full, std::integral_constant<int, 3>{});
  }
  for (; i + kLanes <= n; i += kLanes) body(i, full, std::integral_constant<int, 0>{});
  if (i < n) body(i, static_cast<int>(n - i), std::integral_constant<int, 1>{});
}
// load/store for such bodies: whole vectors take the fast path, resolved when compiling.
template <class T>
inline F load_n(const T* p, std::integral_constant<int, kLanes>, float = 0.0f) {
  return load(p);
}
template <class T>
inline F load_n(const T* p, int n, float fill = 0.0f) {
  return load_part(p, n, fill);
}
template <class T>
inline void store_n(T* p, F v, std::integral_constant<int, kLanes>) {
  store(p, v);
}
template <class T>
inline void store_n(T* p, F v, int n) {
  store_part(p, v, n);
}

// Calls body(T{}) with the C++ type of a float dtype; validate() has refused the others.
template <class Body>
inline void visit_float(DType dtype, const Body& body) {
  if (dtype == DType::bf16) return body(bf16{});
  body(float{});
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
