// What the backward attention kernels for sm_80 share (attention_sm80_keys.cu, attention_sm80_rows.cu).
//
//   Against every tile of scores that is seen, with Z the dropout's multiplier:
//     P = exp2(logits factor - base),  G = P (dO V^T Z - delta) cap'
//     attention_keys_sm80   dV += (P Z)^T dO,  dK += G^T Q      4 products
//     attention_rows_sm80   dQ += G K                           3 products
//
//   Every sum is made by one block in a fixed order: no atomics, equal bits in every run, no room but two floats a row.
//   The price: scores and dO V^T are made twice, 14 rows keys head_dim flops where atomic sums need 10. So the roof is
//   5/7 of the tensor cores' rate in the customary count of 10 (above head dims of 128 10/16: see
//   attention_sm80_keys.cu); sums on an integer grid would be as deterministic at 10.
#pragma once

#include "cuda/attention_sm80.cuh"
#include "cuda/attention_sm80_call.h"

namespace llmengine::cuda::attention {

template <class T>
struct Backward {
  Operand<const T> query, key, value, grad_output;
  Operand<T> grad_query, grad_key, grad_value;
  const float *base, *delta;
  Options options;
  Sizes sizes;
};

template <class T>
Backward<T> backward_of(const AttentionBackward& p, const Sizes& sizes) {
  return {operand_of<const T>(p.query),
          operand_of<const T>(p.key),
          operand_of<const T>(p.value),
          operand_of<const T>(p.grad_output),
          operand_of<T>(p.grad_query),
          operand_of<T>(p.grad_key),
          operand_of<T>(p.grad_value),
          p.base.template as<float>(),
          p.delta.template as<float>(),
          options_of(p),
          sizes};
}

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

// Launched by run() in turn; `stream` is where the call runs.
void run_statistics(const AttentionBackward& p, Stream stream);
void run_rows(const AttentionBackward& p, Stream stream);
void run_keys(const AttentionBackward& p, Stream stream);

}  // namespace llmengine::cuda::attention
