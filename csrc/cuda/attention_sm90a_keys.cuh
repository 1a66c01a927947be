// What kernels for Hopper whose blocks own keys share (attention_sm90a_keys.cu, attention_sm90a_one_pass.cu): scores
// that lie transposed, a warpgroup's 64 keys by the rows that pass.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attention_sm90a_backward.cuh"

namespace llmengine::cuda::attention {

// P^T of a warp's 16 keys.
template <bool simple, class S, class T>
__device__ __forceinline__ void to_probabilities(Sums<1, S::passing>& x, Sums<1, S::passing>& products,
                                                 const Walked<T>& p, const Work& w, const Span& reach, int head,
                                                 int key, int row, const float* shift, const float* base) {
  const Options& o = p.backward.options;
  if (!simple) copy(x, products);
  if (!simple && !p.plain) {
    const Sequence& of = w.s;
    const int batch = ptx::made_here(static_cast<int>(of.batch));  // its mask's place stays in no register
    const Sequence s{batch, of.index, of.row0, of.rows, of.key0, of.keys};
    make_logits<T, true>(x, o, s, ptx::made_here(head), key, row);
  }
  if (!reach.all(row, row + S::passing)) hide_unseen<true>(x, w.s.band(o), key, row);
  to_probabilities_of_columns<simple>(x, o.factor, shift, base);
}

}  // namespace llmengine::cuda::attention
