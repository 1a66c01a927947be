// A token's loss and gradient once the log-sum-exp of its logits is known (formulas: ops/cross_entropy.h): of logits in
// memory (cross_entropy.cu) and of a linear layer's (linear_cross_entropy.cu).
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/maths.cuh"
#include "cuda/row.cuh"
#include "ops/cross_entropy.h"

namespace llmengine::cuda {

struct LossOptions {
  const int64_t* target;
  const float *weight, *weight_sum;  // null: every class weighs 1
  bool weight_aligned;
  int classes;
  int64_t ignore_index;
  float kept, share, z_loss;  // 1 - label_smoothing, label_smoothing / classes
  float softcap, inverse_softcap;

  __device__ bool is_class(int64_t label) const { return label >= 0 && label < classes; }
  __device__ float weight_of(int64_t label) const { return weight && is_class(label) ? weight[label] : 1.0f; }
  __device__ float sum_of_weights() const { return weight_sum ? *weight_sum : static_cast<float>(classes); }
};

inline LossOptions options_of(const ops::CrossEntropyOptions& p, const TensorView& weight_sum, int classes) {
  LossOptions o{};
  o.target = p.target.as<int64_t>();
  o.weight = p.weight.as<float>();
  o.weight_aligned = p.weight.defined() && has_aligned_rows(p.weight);
  if (p.weight.defined() && p.label_smoothing > 0) o.weight_sum = weight_sum.as<float>();
  o.classes = classes;
  o.ignore_index = p.ignore_index;
  o.kept = static_cast<float>(1.0 - p.label_smoothing);
  o.share = p.label_smoothing > 0 ? static_cast<float>(p.label_smoothing / classes) : 0.0f;
  o.z_loss = static_cast<float>(p.z_loss);
  o.softcap = static_cast<float>(p.softcap);
  o.inverse_softcap = p.softcap > 0 ? static_cast<float>(1.0 / p.softcap) : 0.0f;
  return o;
}

// Weights of n classes from `column` on, times `factor`.
template <int n>
__device__ __forceinline__ void load_weights(const LossOptions& o, int column, float factor, float (&w)[n]) {
  if constexpr (n == 1) {
    w[0] = o.weight ? o.weight[column] : 1.0f;
  } else if (o.weight) {
    load_floats(o.weight, column, o.classes, o.weight_aligned && column % 4 == 0, w);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) w[i] = 1.0f;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) w[i] *= factor;
}

// log_total: the logarithm of sum exp(z - largest), so that lse = largest + log_total. Not from lse - z_y: where a row
// is nearly certain, log_total is far smaller than the logits.
__device__ __forceinline__ float loss_of(const LossOptions& o, int64_t label, float largest, float log_total,
                                         float of_target, float weighted) {
  float loss = o.kept * o.weight_of(label) * (log_total + (largest - of_target));
  if (o.share > 0.0f) {
    const float weights = o.sum_of_weights();
    loss += o.share * (weights * log_total + (weights * largest - weighted));
  }
  const float lse = largest + log_total;
  return loss + o.z_loss * lse * lse;
}

// dloss / dz_c = p_c probability - w_c smoothing - [c = label] picked
struct Factors {
  float probability, smoothing, picked;
};

// upstream: the gradient of the token's loss, before the mean's division.
__device__ __forceinline__ Factors factors_of(const LossOptions& o, float upstream, float normaliser, int64_t label,
                                              float lse) {
  float scale = upstream * (normaliser == 0.0f ? 0.0f : 1.0f / normaliser);
  if (!o.is_class(label)) scale = NAN;
  const float picked = o.kept * o.weight_of(label);
  const float smoothing = o.share > 0.0f ? o.share * o.sum_of_weights() : 0.0f;
  return {scale * (picked + smoothing + 2.0f * o.z_loss * lse), scale * o.share, scale * picked};
}

// Turns n logits from `column` on into their gradient.
template <bool kSmoothed, bool kCapped, int n>
__device__ __forceinline__ void make_gradient(const LossOptions& o, const Factors& factors, float lse, int64_t label,
                                              int column, float (&x)[n]) {
  float tangent[n], smoothing[n];
  if constexpr (kSmoothed) load_weights(o, column, factors.smoothing, smoothing);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (kCapped) {
      tangent[i] = tanhf(x[i] * o.inverse_softcap);
      x[i] = o.softcap * tangent[i];
    }
    x[i] = exp_of(x[i] - lse) * factors.probability;
    if constexpr (kSmoothed) x[i] -= smoothing[i];
  }
  const int64_t place = label - column;
  if (place >= 0 && place < n) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] -= i == place ? factors.picked : 0.0f;
  }
  if constexpr (kCapped) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] *= 1.0f - tangent[i] * tangent[i];
  }
}

// body(smoothed, capped) with the two as constants.
template <class Body>
constexpr void visit_options(bool smoothed, bool capped, const Body& body) {
  const auto with_softcap = [&](auto constant) {
    capped ? body(constant, std::true_type{}) : body(constant, std::false_type{});
  };
  smoothed ? with_softcap(std::true_type{}) : with_softcap(std::false_type{});
}

inline void check_weight_sum(const Checker& at, const ops::CrossEntropyOptions& p, const TensorView& weight_sum) {
  if (p.weight.defined() && p.label_smoothing > 0) ops::check_statistic(at, weight_sum, "weight_sum", {});
}

}  // namespace llmengine::cuda
