// exp, log, tanh and the normal distribution for kLanes floats. The polynomials are minimax fits made for these
// kernels; each function states its error against double precision (checked by tests/csrc on every instruction set).
#pragma once

#include "cpu/vec.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// exp(x), within 2 ulp; 0 below -87.33 (no denormals), infinity above 88.72, NaN stays NaN.
inline F exp(F x) {
  const F clamped = min(max(x, broadcast(-87.33654f)), broadcast(88.72283f));
  // x = n ln 2 + r, |r| <= ln(2)/2. Adding and taking away 1.5 x 2^23 rounds to an integer.
  const float magic = 12582912.0f;
  const F n = (clamped * 1.44269504f + magic) - magic;
  F r = clamped - n * 0.693145752f;  // ln 2 in two parts: n times the first is exact
  r = r - n * 1.42860677e-6f;
  F p = broadcast(1.3941079e-3f);
  p = p * r + 8.3631798e-3f;
  p = p * r + 4.1666376e-2f;
  p = p * r + 1.6666577e-1f;
  p = p * r + 5.0000000e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two steps, since 2^128 is no float while 2^127 x 2 x p may be one.
  const I whole = __builtin_convertvector(n, I);
  const I half = whole >> 1;
  F y = p * from_bits((half + 127) << 23) * from_bits((whole - half + 127) << 23);
  y = select(x < -87.33654f, F{}, y);
  y = select(x > 88.72283f, broadcast(INFINITY), y);
  return select(x != x, x, y);
}

// exp of n vectors for x <= 88, within 2 ulp: the softmax's, whose arguments are differences from a maximum. 0 below
// -87.33, NaN stays NaN. Side by side, since the processor looks too few instructions ahead to begin with another
// vector while one waits for its own last result.
template <int n>
inline void exp_of_nonpositive(F (&x)[n]) {
  // x = k ln 2 + r, as in exp. The low bits of `shifted` are k + 127, in a float's exponent 2^k: by it p is multiplied
  // and not added to in its exponent, where the low bits of a NaN would carry it out of the NaNs.
  const float magic = 12582912.0f + 127.0f;
  F shifted[n], r[n], p[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) shifted[i] = x[i] * 1.44269504f + magic;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) r[i] = x[i] - (shifted[i] - magic) * 0.693145752f;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) r[i] = r[i] - (shifted[i] - magic) * 1.42860677e-6f;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) p[i] = r[i] * 1.3941079e-3f + 8.3631798e-3f;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + 4.1666376e-2f;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + 1.6666577e-1f;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + 5.0000000e-1f;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) p[i] = p[i] * (r[i] * r[i]) + r[i] + 1.0f;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    const F power = __builtin_bit_cast(F, __builtin_bit_cast(U, shifted[i]) << 23);
    x[i] = select(x[i] < -87.33654f, F{}, p[i] * power);
  }
}
inline F exp_of_nonpositive(F x) {
  F one[1] = {x};
  exp_of_nonpositive(one);
  return one[0];
}

// log(x), within 2 ulp, for x of at least the smallest normal number and below infinity. NaN stays NaN.
inline F log_of_normal(F x) {
  // x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = 2 artanh(s), s = f / (2 + f)
  const I n = (bits(x) - 0x3f3504f3) >> 23;
  const F f = from_bits(bits(x) - (n << 23)) - 1.0f;
  const F s = f / (f + 2.0f);
  const F u = s * s;
  F p = broadcast(0.233313675f);
  p = p * u + 0.285507811f;
  p = p * u + 0.400001223f;
  p = p * u + 0.666666666f;
  const F half_square = 0.5f * (f * f), whole = to_float(n);
  // 2 s = f - half_square + s half_square, which keeps f exact; ln 2 in two parts, as in exp
  const F y = whole * 0.693145752f + (f - (half_square - (s * (half_square + u * p) + whole * 1.42860677e-6f)));
  return select(x != x, x, y);
}

// tanh(x), within 3 ulp.
inline F tanh(F x) {
  const F magnitude = from_bits(bits(x) & 0x7fffffff);
  const F u = x * x;
  F p = broadcast(-6.0621446e-3f);
  p = p * u + 2.0974940e-2f;
  p = p * u - 5.3846675e-2f;
  p = p * u + 1.3332746e-1f;
  p = p * u - 3.3333329e-1f;
  const F small = x + x * u * p;
  const F large = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const F signed_large = from_bits(bits(large) | (bits(x) & static_cast<int32_t>(0x80000000)));
  return select(magnitude < 0.625f, small, select(x != x, x, signed_large));
}

// The standard normal distribution function, (1 + erf(x / sqrt 2)) / 2, and its density at x. The lower tail keeps its
// relative accuracy, where 1 + erf would cancel: 2e-6 for |x| <= 4 and, as the rounding of x^2 grows in the
// exponential, 2e-5 for |x| <= 13. Beyond lies 0.
struct Normal {
  F cdf, density;
};
inline Normal normal(F x) {
  const F z = from_bits(bits(x) & 0x7fffffff) * 0.707106781f;
  const F gauss = exp(-z * z);
  const F u = z * z;
  F p = broadcast(7.8890855e-5f);
  p = p * u - 8.0208311e-4f;
  p = p * u + 5.1895342e-3f;
  p = p * u - 2.6854444e-2f;
  p = p * u + 1.1283600e-1f;
  p = p * u - 3.7612627e-1f;
  p = p * u + 1.1283792f;
  const F near_tail = 0.5f - 0.5f * (z * p);  // z < 1
  const F t = 1.0f / (0.5f * z + 1.0f);
  F q = broadcast(8.4036694e-2f);  // erfc(z) exp(z^2) in t, 1 <= z <= 12
  q = q * t - 1.9631836e-1f;
  q = q * t + 4.2148492e-2f;
  q = q * t + 9.1067969e-2f;
  q = q * t + 1.6522136e-1f;
  q = q * t + 2.5074391e-1f;
  q = q * t + 2.8140422e-1f;
  q = q * t + 2.8215724e-1f;
  q = q * t - 2.2979607e-6f;
  const F tail = select(z < 1.0f, near_tail, 0.5f * gauss * q);
  return {select(x < 0.0f, tail, 1.0f - tail), gauss * 0.398942280f};
}

// For values that are about to be rounded to bf16: the normal distribution function and the slope of x cdf(x) within
// 1e-6, absolutely, by one polynomial each: a third of the instructions of normal(), whose lower tail these have not.
// Below -5 lies 0; NaN stays NaN.
inline F clamp_to_5(F x) { return min(max(x, broadcast(-5.0f)), broadcast(5.0f)); }
inline F near_cdf(F x) {
  const F near = clamp_to_5(x), u = near * near * 0.08f - 1.0f;
  F p = broadcast(0.000608728267f);
  p = p * u - 0.00161326607f;
  p = p * u + 0.00172279752f;
  p = p * u - 0.00268557295f;
  p = p * u + 0.00641051168f;
  p = p * u - 0.0111643411f;
  p = p * u + 0.0164021738f;
  p = p * u - 0.0232686531f;
  p = p * u + 0.0314421728f;
  p = p * u - 0.0404426083f;
  p = p * u + 0.0515205227f;
  p = p * u - 0.0702962801f;
  p = p * u + 0.141363785f;
  return select(x < -5.0f, F{}, near * p + 0.5f);
}
inline F near_gelu_slope(F x) {
  const F near = clamp_to_5(x), u = near * near * 0.08f - 1.0f;
  F p = broadcast(-0.00472110417f);
  p = p * u + 0.012106956f;
  p = p * u - 0.0102467192f;
  p = p * u + 0.0126382634f;
  p = p * u - 0.034731403f;
  p = p * u + 0.0565895326f;
  p = p * u - 0.0678869188f;
  p = p * u + 0.0782097504f;
  p = p * u - 0.0844577923f;
  p = p * u + 0.0807187632f;
  p = p * u - 0.0717864931f;
  p = p * u + 0.0665436983f;
  p = p * u - 0.0751093328f;
  p = p * u + 0.1421341f;
  return select(x < -5.0f, F{}, near * p + 0.5f);
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
