// The Euclidean norm of all elements of a list of tensors together: what clipping by norm compares with its limit.
//
//   norm = sqrt(sum_i x_i^2)
//
// Squares and their sums are double, in an order that depends on the tensors' sizes alone: no float32 overflows on the
// way. The norm is NaN where an element is, otherwise infinite where one is.
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"
#include "ops/tensor_list.h"

namespace llmengine::ops {

struct GradientNorm {
  TensorList gradients;  // contiguous, all of one dtype, of any shapes
  TensorView norm;       // float32 ()

  static constexpr auto fields() {
    using P = GradientNorm;
    return std::tuple{field("gradients", &P::gradients), field("norm", &P::norm)};
  }
};

inline void validate(const GradientNorm& p, std::initializer_list<DType> dtypes = {DType::f32, DType::bf16}) {
  const Checker at{"gradient_norm"};
  validate_list(at, p.gradients, "gradients", p.gradients, dtypes);
  at.defined(p.norm, "norm");
  at.dtype(p.norm, "norm", {DType::f32});
  if (p.norm.numel() != 1) at.fail_at("norm", "has shape " + p.norm.shape() + "; expected one element");
}

}  // namespace llmengine::ops
