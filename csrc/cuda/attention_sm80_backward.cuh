// What the backward attention kernels for sm_80 share (attention_sm80_keys.cu, _rows.cu, _bias.cu).
//
//   Against every tile of scores that is seen, with Z the dropout's multiplier:
//     P = exp2((logits - shift) factor - base),  G = P (dO V^T Z - delta) cap'
//     attention_keys_sm80   dV += (P Z)^T dO,  dK += G^T Q      4 products
//     attention_rows_sm80   dQ += G K                           3 products
//   and where it is wanted (attention_sm80_bias.cu), G before the soft cap, summed over what a bias was shared by
//
//   shift is 0 of plain logits, whose kernels know of none (attention_logits.cuh).
//
//   Every sum is made by one block in a fixed order: no atomics, equal bits in every run, no room but three floats a
//   row. The price: scores and dO V^T are made twice, 14 rows keys head_dim flops where atomic sums need 10. So the
//   roof, in the customary count of 10, is 5/7 of the tensor cores' rate, and 5/8 above head dims of 128, where scores
//   are made three times (attention_sm80_keys.cu). Sums on a grid of integers are as deterministic at 10:
//   attention_grid.h, on Hopper.
#pragma once

#include "cuda/attention_logits.cuh"
#ifndef __CUDACC_RTC__
#include "cuda/attention_call.h"
#endif

namespace llmengine::cuda::attention {

template <class T>
struct Backward {
  Operand<const T> query, key, value, grad_output;
  Operand<T> grad_query, grad_key, grad_value;
  const float *shift, *base, *delta;
  Options options;
  Sizes sizes;
};

#ifndef __CUDACC_RTC__
template <class T>
Backward<T> backward_of(const AttentionBackward& p, const Sizes& sizes, Padding padding = Padding::masks) {
  return {operand_of<const T>(p.query),       operand_of<const T>(p.key),   operand_of<const T>(p.value),
          operand_of<const T>(p.grad_output), operand_of<T>(p.grad_query),  operand_of<T>(p.grad_key),
          operand_of<T>(p.grad_value),        p.shift.template as<float>(), p.base.template as<float>(),
          p.delta.template as<float>(),       options_of(p, padding),       sizes};
}
#endif

// ---- of rows --------------------------------------------------------------------------------------------------------

// shift, base and delta of this thread's rows, from row `first` of all on; below the last of `count`, those that make P
// and its gradient 0. `simple`: logits are plain.
template <int blocks, bool simple>
struct RowStatistics {
  float shift[blocks][2], base[blocks][2], delta[blocks][2];

  template <class T>
  __device__ __forceinline__ RowStatistics(const Backward<T>& p, int64_t first, int count) {
#pragma unroll
    for (int m = 0; m < blocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int line = 16 * m + 8 * half + lane_of() / 4;
        shift[m][half] = !simple && line < count ? p.shift[first + line] : 0.0f;
        base[m][half] = line < count ? p.base[first + line] : INFINITY;
        delta[m][half] = line < count ? p.delta[first + line] : 0.0f;
      }
  }

  // Logits to P.
  template <int n>
  __device__ __forceinline__ void to_probabilities(float (&x)[blocks][n][4], float factor) const {
#pragma unroll
    for (int m = 0; m < blocks; ++m)
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[m][j][i] = ptx::exp2_approx(fmaf(x[m][j][i] - shift[m][i / 2], factor, -base[m][i / 2]));
  }
};

// The same of logits whose rows are columns.
template <bool simple, int blocks, int n>
__device__ __forceinline__ void to_probabilities_of_columns(float (&x)[blocks][n][4], float factor, const float* shift,
                                                            const float* base) {
  each(x, [&](float& u, int, int c) { u = ptx::exp2_approx(fmaf(simple ? u : u - shift[c], factor, -base[c])); });
}

// Where a warp's tile of scores lies.
struct Corner {
  int head, row, key;
  bool all;  // every row sees every key
};

// Of a warp's rows (from `own` of their tiles) and a tile of keys: query key^T, P, and dO V^T Z - delta.
template <bool plain, int blocks, class T, int rows, int keys, int D>
__device__ __forceinline__ void scores_of_rows(Sums<blocks, keys>& products, Sums<blocks, keys>& p,
                                               Sums<blocks, keys>& grad, const Tile<T, rows, D>& query,
                                               const Tile<T, rows, D>& grad_output, int own,
                                               const Tile<T, keys, D>& key, const Tile<T, keys, D>& value,
                                               const Options& o, const Sizes& sizes, const Sequence& s,
                                               const Corner& at, const RowStatistics<blocks, plain>& statistics) {
  product_of_rows<blocks>(products, query, own, key);
  copy(products, p);
  if constexpr (!plain) make_logits<T, false>(p, o, s, at.head, at.row, at.key);
  if (!at.all) hide_unseen<false>(p, s.band(o), at.row, at.key);
  statistics.to_probabilities(p, o.factor);
  product_of_rows<blocks>(grad, grad_output, own, value);
  if (o.dropout.seed) {
    const auto stream = static_cast<uint32_t>(s.index * sizes.heads + at.head);
    drop(grad, draw<false, blocks, keys / 8>(o.dropout, stream, at.row, at.key), o.dropout.keep_scale);
  }
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < keys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) grad[m][j][i] -= statistics.delta[m][i / 2];
}

// ---- of logits ------------------------------------------------------------------------------------------------------

// What a score's gradient is multiplied by on its way through the soft cap; u: the product.
__device__ __forceinline__ float slope_of_cap(const Options& o, float u) {
  const float t = tanh_of(u * (o.scale / o.softcap));
  return 1.0f - t * t;
}

// `grad`, dO V^T Z - delta, to the gradients of the products, but for scale.
template <bool plain, int blocks, int n>
__device__ __forceinline__ void through_softmax(float (&grad)[blocks][n][4], const float (&p)[blocks][n][4],
                                                const float (&products)[blocks][n][4], const Options& o) {
  const bool capped = !plain && o.softcap > 0.0f;
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grad[m][j][i] *= p[m][j][i];
        if (capped) grad[m][j][i] *= slope_of_cap(o, products[m][j][i]);
      }
}

#ifndef __CUDACC_RTC__
// Launched by run() in turn; `stream` is where the call runs. `padding`: what kernels that read the statistics make of
// it. `squares`: null, or room for |dO|^2 of each row and then |query|^2. `wanted`: null, or on the device, whether the
// gradient is.
void run_statistics(const AttentionBackward& p, Stream stream, Padding padding = Padding::masks,
                    float* squares = nullptr);
void run_rows(const AttentionBackward& p, Stream stream);
void run_keys(const AttentionBackward& p, Stream stream);
void run_mask(const AttentionBackward& p, Stream stream, const int* wanted = nullptr);
void run_distances(const AttentionBackward& p, Stream stream);
#endif

}  // namespace llmengine::cuda::attention
