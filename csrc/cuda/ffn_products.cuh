// What a feed-forward block's products end in (formulas: ops/ffn.h), eight hidden units of a token at a time: shared by
// ffn_sm80.cu and ffn_sm90a.cu, whose products differ.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/activation.cuh"
#include "cuda/dropout.cuh"
#include "cuda/ffn.h"
#include "cuda/row.cuh"

namespace llmengine::cuda {

// The products of ffn_products.cu that have epilogues of their own, by one core and by the other.
void hidden_product_sm80(const FeedForwardForward& p, Stream stream);
void hidden_product_sm90a(const FeedForwardForward& p, Stream stream);
void hidden_gradient_sm80(const FeedForwardBackward& p, Stream stream);
void hidden_gradient_sm90a(const FeedForwardBackward& p, Stream stream);

}  // namespace llmengine::cuda

namespace llmengine::cuda::ffn {

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Hidden {
  int tokens, columns;  // columns: f
  Line b_up, b_gate;
  Rows<T> up, gate, hidden;
  Dropout dropout;
  Activation activation;
};

inline Activation activation_of(const std::string& name) { return ops::activation_of(Checker{"ffn"}, name); }

template <class T>
Hidden<T> hidden_of(const FeedForwardForward& p) {
  return {static_cast<int>(p.input.size(0)),
          static_cast<int>(p.w_up.size(0)),
          line_of(p.b_up),
          line_of(p.b_gate),
          rows_of<T>(p.up),
          rows_of<T>(p.gate),
          rows_of<T>(p.hidden),
          dropout_of(p.dropout_p, p.seed),
          activation_of(p.activation)};
}

// x[0]: up's sums, and of a gated block x[1]: the gate's.
template <class T, int sides>
__device__ __forceinline__ void finish_hidden(const Hidden<T>& p, uint64_t seed, int64_t row, int column,
                                              float (&x)[sides][8]) {
  constexpr bool gated = sides == 2;
  if (row >= p.tokens) return;
  add_line<T>(p.b_up, column, p.columns, x[0]);
  if (p.up.data) store_vector(p.up[row], column, p.columns, p.up.aligned, pack<T>(x[0]));
  if constexpr (gated) {
    add_line<T>(p.b_gate, column, p.columns, x[1]);
    if (p.gate.data) store_vector(p.gate[row], column, p.columns, p.gate.aligned, pack<T>(x[1]));
  }
  if (!p.hidden.data) return;
  visit_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[0][i] = gated ? value_of<activation>(x[sides - 1][i]) * x[0][i] : value_of<activation>(x[0][i]);
    }
  });
  if (p.dropout.seed) drop(p.dropout, seed, row, column, x[0]);
  store_vector(p.hidden[row], column, p.columns, p.hidden.aligned, pack<T>(x[0]));
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Gradient {
  int tokens, columns;
  Rows<const T> up, gate;
  Rows<T> grad_up, grad_gate, hidden;
  Rows<float> partial_up, partial_gate;  // sums over 64 tokens each, so many of them:
  int lines;
  Dropout dropout;
  Activation activation;
};

template <class T>
Gradient<T> gradient_of(const FeedForwardBackward& p) {
  Gradient<T> to{};
  to.tokens = static_cast<int>(p.input.size(0)), to.columns = static_cast<int>(p.w_up.size(0));
  to.up = rows_of<const T>(p.up), to.gate = rows_of<const T>(p.gate);
  to.grad_up = rows_of<T>(p.grad_up), to.grad_gate = rows_of<T>(p.grad_gate);
  if (p.grad_w_down.defined()) to.hidden = rows_of<T>(p.hidden);
  if (p.grad_b_up.defined()) to.partial_up = rows_of<float>(p.partial_up);
  if (p.grad_b_gate.defined()) to.partial_gate = rows_of<float>(p.partial_gate);
  to.lines = (to.tokens + 127) / 128 * 2;
  to.dropout = dropout_of(p.dropout_p, p.seed);
  to.activation = activation_of(p.activation);
  return to;
}

inline constexpr int kAhead = 4;  // vectors whose pre-activations a thread asks for at once

struct PreActivations {
  uint4 up, gate;
};

template <class T, bool gated>
__device__ __forceinline__ PreActivations load_pre_activations(const Gradient<T>& p, int64_t row, int column) {
  PreActivations x{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (row >= p.tokens) return x;
  x.up = load_vector(p.up[row], column, p.columns, p.up.aligned);
  if constexpr (gated) x.gate = load_vector(p.gate[row], column, p.columns, p.gate.aligned);
  return x;
}

// From the gradient of the hidden layer in `grad` to the gradients of up, there, and of gate.
template <class T, bool gated>
__device__ __forceinline__ void finish_gradients(const Gradient<T>& p, uint64_t seed, int64_t row, int column,
                                                 const PreActivations& x, float (&grad)[8], float (&grad_gate)[8]) {
  // What passes the choice of an activation are two lines of eight: few registers are left beside the sums.
  float value[8], slope[8], keep[8], up[8], hidden[8];
  unpack<T>(gated ? x.gate : x.up, value);
  visit_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const ValueAndSlope a = with_slope<activation>(value[i]);
      value[i] = a.value, slope[i] = a.slope;
    }
  });
#pragma unroll
  for (int i = 0; i < 8; ++i) keep[i] = 1.0f;
  if (p.dropout.seed) drop(p.dropout, seed, row, column, keep);
  unpack<T>(x.up, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float kept = grad[i] * keep[i];
    hidden[i] = value[i] * keep[i] * (gated ? up[i] : 1.0f);
    grad[i] = kept * (gated ? value[i] : slope[i]);
    grad_gate[i] = kept * up[i] * slope[i];
  }
  const int columns = p.columns;
  store_vector(p.grad_up[row], column, columns, p.grad_up.aligned, pack<T>(grad));
  if constexpr (gated) store_vector(p.grad_gate[row], column, columns, p.grad_gate.aligned, pack<T>(grad_gate));
  if (p.hidden.data) store_vector(p.hidden[row], column, columns, p.hidden.aligned, pack<T>(hidden));
}

// The same, and a thread's sums over its tokens.
template <class T, bool gated>
__device__ __forceinline__ void add_gradients(const Gradient<T>& p, uint64_t seed, int64_t row, int column,
                                              const PreActivations& saved, float (&grad)[8], float (&sum_up)[8],
                                              float (&sum_gate)[8]) {
  if (row >= p.tokens) return;
  float grad_gate[8];
  finish_gradients<T, gated>(p, seed, row, column, saved, grad, grad_gate);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum_up[i] += grad[i];
    if constexpr (gated) sum_gate[i] += grad_gate[i];
  }
}

__device__ __forceinline__ uint64_t seed_of(const Dropout& dropout) {
  return dropout.seed ? static_cast<uint64_t>(*dropout.seed) : 0;
}

}  // namespace llmengine::cuda::ffn
