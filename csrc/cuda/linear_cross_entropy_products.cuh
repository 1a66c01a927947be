// What the products of a linear layer's cross-entropy end in (formulas: ops/linear_cross_entropy.h,
// ops/cross_entropy.h): shared by linear_cross_entropy_sm80.cu and linear_cross_entropy_sm90a.cu, whose products
// differ.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/gemm.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/token_loss.cuh"

namespace llmengine::cuda {

// The products of linear_cross_entropy.cu, by one core and by the other. Of the forward: how many spans there are,
// whole tiles, of those that p.partial has room for. The gradient is that of a part of the logits, in p.block.
struct LogitsPart {
  int64_t token, tokens;   // [token, token + tokens)
  int64_t first, classes;  // [first, first + classes)
};
int logits_of_spans_sm80(const LinearCrossEntropyForward& p, Stream stream);
int logits_of_spans_sm90a(const LinearCrossEntropyForward& p, Stream stream);
void logits_gradient_sm80(const LinearCrossEntropyBackward& p, const LogitsPart& part, Stream stream);
void logits_gradient_sm90a(const LinearCrossEntropyBackward& p, const LogitsPart& part, Stream stream);

// The labels of a tile's tokens in shared memory: a class, or one of these.
constexpr int kNoClass = -1, kIgnored = -2;

__device__ __forceinline__ int label_of(const LossOptions& o, int token, int tokens) {
  if (token >= tokens) return kIgnored;
  const int64_t label = o.target[token];
  return label == o.ignore_index ? kIgnored : o.is_class(label) ? static_cast<int>(label) : kNoClass;
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ float element_of(const Line& line, int column) {
  if (line.is_float) return static_cast<const float*>(line.data)[column];
  return to_float(static_cast<const T*>(line.data)[column]);
}

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// exp(x - largest), where a row without a logit above -inf so far has no exponentials but NaN's, which no maximum sees.
__device__ __forceinline__ float exp_below(float x, float largest) {
  return exp_of(x - (largest == -INFINITY ? 0.0f : largest));
}

// A logit from a sum: bias and softcap; -inf past the last class.
__device__ __forceinline__ float logit_of(const LossOptions& o, float sum, float bias, bool inside) {
  float z = sum + bias;
  if (o.softcap > 0.0f) z = o.softcap * tanhf(z * o.inverse_softcap);
  return inside ? z : -INFINITY;
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct LogitsGradient {
  int tokens, columns;  // of the part; columns: classes
  int first;            // class of the part
  Line bias;
  LossOptions options;
  const float *grad_loss, *lse, *normaliser;
  const float* factors;  // of a shard, three numbers a token: in the place of those that the loss gives
  int64_t factors_stride, grad_loss_stride;
  Rows<T> grad;              // (tokens, classes of the part)
  Rows<float> partial_bias;  // sums over 64 tokens each, so many of them:
  int lines;
};

template <class T>
LogitsGradient<T> logits_gradient_of(const LinearCrossEntropyBackward& p, const LogitsPart& part) {
  LogitsGradient<T> to{};
  to.tokens = static_cast<int>(part.tokens), to.columns = static_cast<int>(part.classes);
  to.first = static_cast<int>(part.first);
  to.bias = line_of(p.linear_bias);
  to.options = options_of(p, p.weight_sum, static_cast<int>(p.linear_weight.size(0)));
  to.options.target += part.token;
  to.grad_loss_stride = p.grad_loss.ndim ? p.grad_loss.stride(0) : 0;
  if (p.grad_loss.defined()) to.grad_loss = p.grad_loss.as<float>() + part.token * to.grad_loss_stride;
  to.lse = p.lse.as<float>() + part.token, to.normaliser = p.normaliser.as<float>();
  to.factors_stride = p.input.size(0);
  if (p.factors.defined()) to.factors = p.factors.as<float>() + part.token;
  to.grad = rows_of<T>(p.block);
  to.lines = (to.tokens + 127) / 128 * 2;
  if (p.grad_linear_bias.defined()) {
    to.partial_bias = rows_of<float>(rows_from(p.partial_bias, part.token / 64, to.lines));
  }
  return to;
}

// What the epilogue wants of so many tokens, beside the stages in shared memory: asked for before the product, so that
// no vector waits for it.
template <int count>
struct Tokens {
  int label[count];
  float lse[count], probability[count], smoothing[count], picked[count];
};

template <class T, int count>
__device__ __forceinline__ void begin_token(const LogitsGradient<T>& p, Tokens<count>& tokens, int line, int token) {
  const int label = label_of(p.options, token, p.tokens);
  tokens.label[line] = label;
  if (label == kIgnored) return;
  const float lse = p.lse[token];
  Factors factors;
  if (p.factors) {
    const float* of_token = p.factors + token;
    factors = {of_token[0], of_token[p.factors_stride], of_token[2 * p.factors_stride]};
  } else {
    factors = factors_of(p.options, p.grad_loss[token * p.grad_loss_stride], *p.normaliser, label, lse);
  }
  tokens.lse[line] = lse;
  tokens.probability[line] = factors.probability;
  tokens.smoothing[line] = factors.smoothing;
  tokens.picked[line] = factors.picked;
}

template <class T, int count>
__device__ __forceinline__ void make_gradient_of_sums(const LogitsGradient<T>& p, const Tokens<count>& tokens, int line,
                                                      int column, float (&x)[8]) {
  const LossOptions& o = p.options;
  add_line<T>(p.bias, column, o.classes, x);
  const Factors factors{tokens.probability[line], tokens.smoothing[line], tokens.picked[line]};
  visit_options(o.share > 0.0f, o.softcap > 0.0f, [&](auto smoothed, auto capped) {
    make_gradient<smoothed, capped>(o, factors, tokens.lse[line], tokens.label[line], column, x);
  });
}

// Eight sums of a token, from class `column` of the block on, into the gradient of its logits; they join `sums`.
template <class T, int count>
__device__ __forceinline__ void finish_gradient(const LogitsGradient<T>& p, const Tokens<count>& tokens, int line,
                                                int token, int column, float (&x)[8], float (&sums)[8]) {
  if (token >= p.tokens) return;
  if (tokens.label[line] == kIgnored) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
  } else {
    make_gradient_of_sums(p, tokens, line, p.first + column, x);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] += x[i];
  store_vector(p.grad[token], column, p.columns, p.grad.aligned, pack<T>(x));
}

}  // namespace llmengine::cuda
