// Softmax of rows.
//
//   y = exp(x - max x) / sum exp(x - max x);  a row of -inf alone (fully masked) gives zeros
//   backward: grad_x = y (grad_y - sum(grad_y y))
//
// Input and output may differ in dtype: arithmetic is float, and one rounding ends it.
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

struct SoftmaxForward {
  TensorView input;   // (rows, columns), unit column stride
  TensorView output;  // like input

  static constexpr auto fields() {
    using P = SoftmaxForward;
    return std::tuple{field("input", &P::input), field("output", &P::output)};
  }
};

struct SoftmaxBackward {
  TensorView grad_output, output;  // (rows, columns), one dtype
  TensorView grad_input;           // like them, in the dtype of the forward's input

  static constexpr auto fields() {
    using P = SoftmaxBackward;
    return std::tuple{field("grad_output", &P::grad_output), field("output", &P::output),
                      field("grad_input", &P::grad_input)};
  }
};

using Floats = std::initializer_list<DType>;
inline constexpr Floats kSoftmaxFloats = {DType::f32, DType::bf16};  // that every backend computes with

inline void check_softmax_rows(const Checker& at, const NamedTensors& tensors, Floats floats) {
  const TensorView& first = *tensors.begin()->tensor;
  for (auto [t, argument] : tensors) {
    at.defined(*t, argument);
    at.dtype(*t, argument, floats);
    if (t->ndim != 2) at.fail_at(argument, "must be (rows, columns), got " + t->shape());
    at.shape(*t, argument, {first.size(0), first.size(1)});
    at.unit_last_stride(*t, argument);
  }
}

inline void validate(const SoftmaxForward& p, Floats floats = kSoftmaxFloats) {
  check_softmax_rows(Checker{"softmax"}, {{&p.input, "input"}, {&p.output, "output"}}, floats);
}

inline void validate(const SoftmaxBackward& p, Floats floats = kSoftmaxFloats) {
  const Checker at{"softmax backward"};
  check_softmax_rows(at, {{&p.grad_output, "grad_output"}, {&p.output, "output"}, {&p.grad_input, "grad_input"}},
                     floats);
  at.dtype(p.grad_output, "grad_output", {p.output.dtype});
}

}  // namespace llmengine::ops
