// No operator of a model: the products' innermost loop on operands in the first-level cache, over and over on every
// thread. Its rate is the ceiling of `llmengine bench`.
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

struct MultiplyAddPeak {
  TensorView unit;     // empty: its dtype is that of the operands
  int64_t rounds = 1;  // products on each thread
  TensorView flops;    // float64 (1,): receives the operations done, a multiply-add being two

  static constexpr auto fields() {
    using P = MultiplyAddPeak;
    return std::tuple{field("unit", &P::unit), field("rounds", &P::rounds), field("flops", &P::flops)};
  }
};

inline void validate(const MultiplyAddPeak& p) {
  const Checker at{"multiply_add_peak"};
  at.dtype(p.unit, "unit", {DType::f32, DType::bf16});
  at.dtype(p.flops, "flops", {DType::f64});
  at.shape(p.flops, "flops", {1});
  if (p.rounds < 1) at.fail_at("rounds", "is " + std::to_string(p.rounds) + "; must be at least 1");
}

}  // namespace llmengine::ops
