// What kernels for Hopper whose blocks own keys share (attention_sm90a_keys.cu, attention_sm90a_one_pass.cu): scores
// that lie transposed, a warpgroup's 64 keys by the rows that pass, from their products to what gradients are made of.
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

// Rows that pass a warp's 16 keys.
struct PassingRows {
  int head, key, row;
  const float *shift, *base, *delta;
  const uint16_t* grad_output;
};

// S^T = K Q^T and dP^T = V dO^T, begun in this order, to P^T Z, whose product with dO is begun and reads `rounded`, and
// to G^T. on_probabilities() when x has become P^T; on_gradients() when `grad` is (dP^T Z - delta) and x is P^T.
template <class T, int D, bool simple, class S>
__device__ __forceinline__ void to_gradients(Sums<1, S::passing>& x, Sums<1, S::passing>& grad,
                                             uint32_t (&rounded)[1][S::passing / 16][4],
                                             uint32_t (&rounded_grad)[1][S::passing / 16][4], Sums<1, D>& grad_value,
                                             const Walked<T>& p, const Work& w, const Span& reach,
                                             const PassingRows& at, const auto& on_probabilities,
                                             const auto& on_gradients) {
  const Options& o = p.backward.options;
  const bool drops = !simple && o.dropout.seed != nullptr;
  Sums<1, S::passing> products, kept;
  ptx::wgmma_wait<1>(flat(x));
  to_probabilities<simple, S>(x, products, p, w, reach, at.head, at.key, at.row, at.shift, at.base);
  on_probabilities();
  Dropped<1, S::passing / 8> dropped;
  if (drops) {
    const auto stream = static_cast<uint32_t>(w.s.index * p.backward.sizes.heads + at.head);
    dropped = draw<true, 1, S::passing / 8, 1>(o.dropout, stream, at.key, at.row);
  }
  copy(x, kept);
  if (drops) drop(kept, dropped, 1.0f);
  round_to_operands<T>(kept, rounded);
  ptx::wgmma_fence(flat(grad_value));
  begin_adding_product<T, D>(grad_value, rounded, at.grad_output);
  ptx::wgmma_wait<1>(flat(grad));
  if (drops) drop(grad, dropped, o.dropout.keep_scale);
  each(grad, [&](float& g, int, int c) { g -= at.delta[c]; });
  on_gradients();
  through_softmax<simple>(grad, x, products, o);
  round_to_operands<T>(grad, rounded_grad);
}

}  // namespace llmengine::cuda::attention
