// The grid of integers on which the one pass of Hopper's backward adds up the gradients of queries
// (attention_sm90a_one_pass.cu): how fine it is, and where its numbers lie. Standard library only: tests run it as it
// is.
//
//   Many blocks add to one number, in any order. Sums of floats depend on the order, sums of integers do not: so every
//   part of dQ_i = sum over keys j of G_ij K_j is rounded to a multiple of a step of its row, which is known before the
//   pass. With Z dropout's multiplier, |G_ij| <= P_ij |dO_i V_j Z_ij - delta_i|, and over any keys of the row
//
//     sum |G_ij K_jd| <= (keep |dO_i| max |V_j| + |delta_i|) max |K_jd| sum P_ij = bound_i sum P_ij       (norms: of 2)
//
//   The step is a power of two by which bound_i is less than 2^29. What kernels add stays below 2^31 all the same:
//     sum P_ij    1, but for lse and logits that are off. A row is the grid's only where scale |q_i| max |k_j|, the
//                 soft cap and |lse_i|, in units of log 2, are at most 2^14: then either is off by less than 2^-16.9
//                 of that (tensor cores cut 17 terms at 2^-24 of the largest, eight times), both by 0.27, and the sum
//                 is 1.21
//     G           rounded to 16 bits: at most doubled (float16's least number), else 2^-8 more
//     sums        of float32, 2^-16 more; every part half a step, of at most 2^22 parts
//   together 2^29 1.21 2.01 + 2^21 < 2^30.3. Integers wrap around at 2^31, so that no order of parts overflows either.
//   What the bound does not hold for (a row as above, norms that overflow, NaN, infinities) is told by flags.
//
//   The bound may be far above what comes out: one key of 10^4 among others of 1 makes steps 10^4 times as large. So it
//   is judged by what came out whether a tile's steps were too coarse, and attention_rows_sm90a makes such tiles anew,
//   as it does those with flags: no result is less exact than its, and NaN appear where they appear in its.
//
//   The gradient of an additive mask that heads or sequences share is added up likewise, but an element's terms are no
//   probabilities of one row: their bound is that of one, (keep |dO_i| max |V_j| + |delta_i|) 1.21, times how many they
//   are, and may be 10^6 times what comes out. So its integers have 64 bits, of which 2^60 is for all terms together:
//   steps are then finer than the terms' own roundings.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace llmengine::cuda::attention {

inline constexpr int kGridBits = 29, kMaskBits = 60;
inline constexpr float kGridReach = 16384.0f;  // of logits, in units of log 2
inline constexpr int kGridRows = 64;           // of a tile of the grid
inline constexpr int kRemadeRows = 128;        // of a tile that may be made anew

// How many steps are 1: a power of two by which `bound` is less than 2^bits. 0 where it is 0, infinite or NaN.
constexpr float steps_of(float bound, int bits = kGridBits) {
  if (!(bound > 0.0f && bound <= std::numeric_limits<float>::max())) return 0.0f;
  const int exponent = static_cast<int>(std::bit_cast<uint32_t>(bound) >> 23) - 127;  // bound < 2^(exponent + 1)
  const int steps = bits - 1 - exponent;
  return std::bit_cast<float>(static_cast<uint32_t>((steps < 126 ? steps : 126) + 127) << 23);
}

// Whether roundings to steps would show in results of at most `largest`, which are rounded by 2^-bits of themselves.
// `error`: a step times the root of how many parts are added. Roundings add up like chance, to 0.29 of that.
constexpr bool is_too_coarse(float largest, float error, int bits) {
  return !(error * static_cast<float>(1 << bits) <= largest);
}

}  // namespace llmengine::cuda::attention
