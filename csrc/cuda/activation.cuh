// The activations of the feed-forward block (formulas: ops/ffn.h), and their slopes.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/maths.cuh"
#include "ops/ffn.h"

namespace llmengine::cuda {

using ops::Activation;

// body(std::integral_constant) of an activation, on the host or the device.
template <class Body>
constexpr void visit_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::gelu: return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh: return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu: return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu_squared: return body(std::integral_constant<Activation, Activation::relu_squared>{});
    case Activation::silu: return body(std::integral_constant<Activation, Activation::silu>{});
  }
}

// Twice the argument of gelu_tanh's tanh, so that (1 + tanh) / 2 is its sigmoid, which keeps its accuracy in the lower
// tail.
__device__ __forceinline__ float tanh_argument(float x) { return 1.59576912f * (x + 0.044715f * x * x * x); }

__device__ __forceinline__ float normal_distribution(float x) { return 0.5f + 0.5f * erff(x * 0.707106781f); }

template <Activation activation>
__device__ __forceinline__ float value_of(float x) {
  if constexpr (activation == Activation::gelu) return x * normal_distribution(x);
  if constexpr (activation == Activation::gelu_tanh) return x * sigmoid(tanh_argument(x));
  if constexpr (activation == Activation::relu) return x < 0.0f ? 0.0f : x;  // NaN stays
  if constexpr (activation == Activation::relu_squared) return x < 0.0f ? 0.0f : x * x;
  if constexpr (activation == Activation::silu) return x * sigmoid(x);
}

struct ValueAndSlope {
  float value, slope;
};

template <Activation activation>
__device__ __forceinline__ ValueAndSlope with_slope(float x) {
  if constexpr (activation == Activation::gelu) {
    const float below = normal_distribution(x);
    return {x * below, below + x * exp_of(-0.5f * x * x) * 0.398942280f};
  } else if constexpr (activation == Activation::gelu_tanh) {
    const float s = sigmoid(tanh_argument(x)), rise = s * (1.0f - s);
    const float inner = 1.59576912f * (1.0f + 0.134145f * x * x);
    return {x * s, rise == 0.0f ? s : s + x * rise * inner};  // where it no longer rises, inner may be infinite
  } else if constexpr (activation == Activation::relu) {
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  } else if constexpr (activation == Activation::relu_squared) {
    const float positive = x < 0.0f ? 0.0f : x;
    return {positive * positive, 2.0f * positive};
  } else {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
}

}  // namespace llmengine::cuda
