// Rotary position embedding (Su et al. 2021): pairs of a head's leading features are turned by the token's angles.
//
//   (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)    for pair k of R / 2, with cos and sin (token, k)
//   pair k: features (k, k + R / 2), or (2 k, 2 k + 1) where interleaved; features from R on pass through
//   backward: the same with -sin; cos and sin are constants
//
// Arithmetic is float, rounded once.
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

struct RotaryForward {
  TensorView input;     // (batch, tokens, heads, head_dim), unit last stride
  TensorView cos, sin;  // float32 (tokens, R / 2), R <= head_dim
  TensorView output;    // like input, contiguous
  bool interleaved = false;

  static constexpr auto fields() {
    using P = RotaryForward;
    return std::tuple{field("input", &P::input), field("cos", &P::cos), field("sin", &P::sin),
                      field("output", &P::output), field("interleaved", &P::interleaved)};
  }
};

struct RotaryBackward {
  TensorView grad_output;  // as RotaryForward::input
  TensorView cos, sin;
  TensorView grad_input;  // as RotaryForward::output
  bool interleaved = false;

  static constexpr auto fields() {
    using P = RotaryBackward;
    return std::tuple{field("grad_output", &P::grad_output), field("cos", &P::cos), field("sin", &P::sin),
                      field("grad_input", &P::grad_input), field("interleaved", &P::interleaved)};
  }
};

inline void validate_rotary(const Checker& at, const NamedTensor& from, const TensorView& cos, const TensorView& sin,
                            const NamedTensor& to, std::initializer_list<DType> dtypes) {
  for (auto [t, argument] : NamedTensors{from, {&cos, "cos"}, {&sin, "sin"}, to}) at.defined(*t, argument);
  const TensorView& x = *from.tensor;
  at.dtype(x, from.name, dtypes);
  if (x.ndim != 4) at.fail_at(from.name, "must be (batch, tokens, heads, head_dim), got " + x.shape());
  at.unit_last_stride(x, from.name);
  for (auto [t, argument] : NamedTensors{{&cos, "cos"}, {&sin, "sin"}}) {
    at.dtype(*t, argument, {DType::f32});
    if (t->ndim != 2 || t->size(1) > x.size(3) / 2) {
      at.fail_at(argument, "must be (tokens, at most head_dim / 2), got " + t->shape());
    }
    at.shape(*t, argument, {x.size(1), cos.size(1)});
    at.contiguous(*t, argument);
  }
  at.dtype(*to.tensor, to.name, {x.dtype});
  at.shape(*to.tensor, to.name, {x.size(0), x.size(1), x.size(2), x.size(3)});
  at.contiguous(*to.tensor, to.name);
}

inline void validate(const RotaryForward& p, std::initializer_list<DType> dtypes = {DType::f32, DType::bf16}) {
  validate_rotary(Checker{"rotary"}, {&p.input, "input"}, p.cos, p.sin, {&p.output, "output"}, dtypes);
}

inline void validate(const RotaryBackward& p, std::initializer_list<DType> dtypes = {DType::f32, DType::bf16}) {
  validate_rotary(Checker{"rotary backward"}, {&p.grad_output, "grad_output"}, p.cos, p.sin,
                  {&p.grad_input, "grad_input"}, dtypes);
}

}  // namespace llmengine::ops
