// What the forward kernels, for every GPU, for Hopper and over a cache, share behind a tile's logits: the online
// softmax of a warp's rows, and what becomes of it. Accumulators are those of matrix_tile.cuh; a warpgroup's 64 rows
// lie in its four warps as `blocks` = 1 each.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/attention_logits.cuh"
#ifndef __CUDACC_RTC__
#include "cuda/attention_call.h"
#endif

namespace llmengine::cuda::attention {

__device__ __forceinline__ float sink_of(const Options& o, int head) { return o.sinks ? o.sinks[head] : -INFINITY; }

// What a row's attention leaves behind.
template <class T>
struct Results {
  Operand<T> output;
  float *lse, *lse_low;
};

#ifndef __CUDACC_RTC__
template <class T>
Results<T> results_of(const ops::AttentionForward& p) {
  return {operand_of<T>(p.output), p.lse.as<float>(), p.lse_low.as<float>()};
}
#endif

// The softmax of a warp's rows over the keys so far; `sum` is over this thread's columns, `base` the maximum: of plain
// logits, which are products, in units of log 2, else a logit (attention_logits.cuh). Exponentials are at most 2^lift:
// the base is so far below the maximum, of plain logits alone.
template <int blocks, int lift = 0>
struct Softmax {
  float base[blocks][2], sum[blocks][2];

  __device__ Softmax() {
#pragma unroll
    for (int m = 0; m < blocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) base[m][half] = -INFINITY, sum[m][half] = 0.0f;
  }

  // Logits x to exponentials; `rescaling` is what brings sums of earlier ones, the output's too, to the new maximum.
  // They are added up here, or elsewhere.
  template <bool here = true, int n>
  __device__ __forceinline__ void add(float (&x)[blocks][n][4], float factor, float (&rescaling)[blocks][2],
                                      bool plain = true) {
#pragma unroll
    for (int m = 0; m < blocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = -INFINITY;
#pragma unroll
        for (int j = 0; j < n; ++j) most = fmaxf(most, fmaxf(x[m][j][2 * half], x[m][j][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
        // rounded, as it is compared and subtracted: the same maximum must give a rescaling of exactly 1
        const float higher = fmaxf(base[m][half], plain ? lowered(__fmul_rn(most, factor)) : most);
        const float from = higher == -INFINITY ? 0.0f : higher;  // no key seen yet: exp2(-inf - 0) is 0, not NaN
        const float before = plain ? 0.0f : from, behind = plain ? from : 0.0f;  // the multiplication
        rescaling[m][half] = ptx::exp2_approx((base[m][half] - from) * (plain ? 1.0f : factor));
        base[m][half] = higher;
        sum[m][half] *= rescaling[m][half];
#pragma unroll
        for (int j = 0; j < n; ++j)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            x[m][j][i] = ptx::exp2_approx(fmaf(x[m][j][i] - before, factor, -behind));
            if constexpr (here) sum[m][half] += x[m][j][i];
          }
      }
  }

  __device__ static float lowered(float most) { return lift == 0 ? most : most - lift; }

  __device__ __forceinline__ void gather() {
#pragma unroll
    for (int m = 0; m < blocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(kWholeWarp, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(kWholeWarp, sum[m][half], 2);
      }
  }

  // Beside gathered sums, a sink: a logit whose value is 0. It comes last, so that a row without keys is known by its
  // sum, and probabilities are no smaller for it. `rescaling` as above.
  __device__ __forceinline__ void add_sink(float sink, float (&rescaling)[blocks][2], bool plain) {
    const float own = plain ? lowered(__fmul_rn(sink, kLog2e)) : sink, factor = plain ? 1.0f : kLog2e;
#pragma unroll
    for (int m = 0; m < blocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float higher = fmaxf(base[m][half], own);
        const auto exponential = [&](float x) { return x == higher ? 1.0f : ptx::exp2_approx((x - higher) * factor); };
        rescaling[m][half] = exponential(base[m][half]);
        sum[m][half] = sum[m][half] * rescaling[m][half] + exponential(own) * static_cast<float>(1 << lift);
        base[m][half] = higher;
      }
  }
};

template <int blocks, int n>
__device__ __forceinline__ void rescale(float (&x)[blocks][n][4], const float (&by)[blocks][2]) {
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][j][i] *= by[m][i / 2];
}

__device__ __forceinline__ double lse_of(double largest, float sum) {
  return sum == 0.0f ? -INFINITY : largest + log(static_cast<double>(sum));
}

// lse of a row, and what rounding takes from it: of logits beyond 2^53 all that the sum adds.
__device__ __forceinline__ void store_lse(float* lse, float* lse_low, double largest, float sum) {
  const float high = static_cast<float>(lse_of(largest, sum));
  *lse = high;
  *lse_low = high == INFINITY || high == -INFINITY
                 ? 0.0f
                 : static_cast<float>((largest - high) + log(static_cast<double>(sum)));
}

// A warp's `count` rows from `row` of its sequence on, whose outputs are not yet divided by their sums, nor met by the
// head's sink, -inf where there is none. They pass through the rows from `own` of a tile, which no other warp uses.
template <class T, int blocks, int lift, int rows, int columns>
__device__ __forceinline__ void store_results(const Results<T>& to, const Sizes& sizes, const Sequence& s, int head,
                                              int row, int count, Softmax<blocks, lift>& softmax, float sink,
                                              float keep_scale, Sums<blocks, columns>& output,
                                              const Tile<T, rows, columns>& through, int own, bool plain = true) {
  softmax.gather();
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < columns / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (softmax.sum[m][i / 2] == 0.0f) output[m][j][i] = 0.0f;  // also where values nobody sees are NaN
  float rescaling[blocks][2];
#pragma unroll
  for (int m = 0; m < blocks; ++m) rescaling[m][0] = rescaling[m][1] = 1.0f;
  if (sink != -INFINITY) softmax.add_sink(sink, rescaling, plain);
  const auto share = [&](int m, int half) {
    const float sum = softmax.sum[m][half];
    return sum == 0.0f ? 0.0f : keep_scale * rescaling[m][half] / sum;
  };
  store_rows(output, share, through, own, to.output.lines(s.batch, head, s.row0 + row), count);
  const int64_t statistics = (s.batch * sizes.heads + head) * sizes.rows + s.row0 + row;
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = 16 * m + 8 * half + lane_of() / 4;
      if (lane_of() % 4 != 0 || line >= count) continue;
      const double unit = plain ? 0.693147180559945309 : 1.0;
      store_lse(to.lse + statistics + line, to.lse_low + statistics + line, unit * softmax.base[m][half],
                softmax.sum[m][half]);
    }
}

// Rows that belong to no sequence, by the whole block: tiles of `rows`, every `step`-th from `tile` on.
template <int threads, class T>
__device__ void leave_empty(const Results<T>& to, const Sizes& sizes, const Sequence& s, int head, int rows, int tile,
                            int step) {
  for (int64_t first = static_cast<int64_t>(tile) * rows; first < s.rows; first += static_cast<int64_t>(step) * rows) {
    const int row0 = s.row0 + static_cast<int>(first), count = least(rows, s.rows - static_cast<int>(first));
    zero_rows<threads>(to.output.lines(s.batch, head, row0), count);
    const int64_t statistics = (s.batch * sizes.heads + head) * sizes.rows + row0;
    for (int row = static_cast<int>(threadIdx.x); row < count; row += threads) {
      to.lse[statistics + row] = -INFINITY;
      to.lse_low[statistics + row] = 0.0f;
    }
  }
}

}  // namespace llmengine::cuda::attention
