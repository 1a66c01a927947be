// A linear layer on tokens: x is (tokens, in), the weight (out, in).
//
//   output = x weight^T + bias
//   backward:  grad_input = grad_output weight,  grad_weight = grad_output^T x,  grad_bias = sum of grad_output's rows
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

struct LinearForward {
  TensorView input;   // (tokens, in)
  TensorView weight;  // (out, in), in input's dtype or float32
  TensorView bias;    // (out,), likewise, or none
  TensorView output;  // (tokens, out), like input

  static constexpr auto fields() {
    using P = LinearForward;
    return std::tuple{field("input", &P::input), field("weight", &P::weight), field("bias", &P::bias),
                      field("output", &P::output)};
  }
};

struct LinearBackward {
  TensorView grad_output;    // (tokens, out)
  TensorView input, weight;  // as in the forward
  // like their tensors, grad_bias (out,) float32; none: not wanted
  TensorView grad_input, grad_weight, grad_bias;
  bool add_weight = false;  // grad_weight is float32, and what it holds grows by the gradient

  static constexpr auto fields() {
    using P = LinearBackward;
    return std::tuple{field("grad_output", &P::grad_output), field("input", &P::input),
                      field("weight", &P::weight),           field("grad_input", &P::grad_input),
                      field("grad_weight", &P::grad_weight), field("grad_bias", &P::grad_bias),
                      field("add_weight", &P::add_weight)};
  }
};

inline void check_linear(const Checker& at, const TensorView& input, const TensorView& weight) {
  at.defined(input, "input");
  at.defined(weight, "weight");
  at.dtype(input, "input", {DType::f32, DType::bf16});
  at.dtype(weight, "weight", {input.dtype, DType::f32});
  if (input.ndim != 2) at.fail_at("input", "must be (tokens, in), got " + input.shape());
  if (weight.ndim != 2) at.fail_at("weight", "must be (out, in), got " + weight.shape());
  at.shape(weight, "weight", {weight.size(0), input.size(1)});
  at.unit_last_stride(input, "input");
  at.unit_last_stride(weight, "weight");
}

inline void check_line(const Checker& at, const TensorView& t, const char* argument,
                       std::initializer_list<DType> dtypes, int64_t size) {
  at.dtype(t, argument, dtypes);
  at.shape(t, argument, {size});
  at.contiguous(t, argument);
}

inline void check_matrix(const Checker& at, const TensorView& t, const char* argument, DType dtype, int64_t rows,
                         int64_t columns) {
  at.dtype(t, argument, {dtype});
  at.shape(t, argument, {rows, columns});
  at.unit_last_stride(t, argument);
}

inline void validate(const LinearForward& p) {
  const Checker at{"linear"};
  check_linear(at, p.input, p.weight);
  at.defined(p.output, "output");
  check_line(at, p.bias, "bias", {p.input.dtype, DType::f32}, p.weight.size(0));
  check_matrix(at, p.output, "output", p.input.dtype, p.input.size(0), p.weight.size(0));
}

inline void validate(const LinearBackward& p) {
  const Checker at{"linear backward"};
  check_linear(at, p.input, p.weight);
  at.defined(p.grad_output, "grad_output");
  const int64_t tokens = p.input.size(0), in = p.input.size(1), out = p.weight.size(0);
  check_matrix(at, p.grad_output, "grad_output", p.input.dtype, tokens, out);
  check_matrix(at, p.grad_input, "grad_input", p.input.dtype, tokens, in);
  check_matrix(at, p.grad_weight, "grad_weight", p.add_weight ? DType::f32 : p.weight.dtype, out, in);
  check_line(at, p.grad_bias, "grad_bias", {DType::f32}, out);
}

}  // namespace llmengine::ops
