// Layer norm and RMS norm of rows, with an optional residual add and dropout in front (Ba et al. 2016; Zhang & Sennrich
// 2019).
//
//   h = residual + dropout(input)                   (h = input without a residual)
//   layer norm: y = (h - mean) rstd w + b,  rstd = 1 / sqrt(var + eps)
//   rms norm:   y = h rstd w,               rstd = 1 / sqrt(mean(h^2) + eps)
//
//   backward, with g = grad_output w and x = (h - mean) rstd:
//     grad_h = rstd (g - mean(g) - x mean(g x)) + grad_new_residual     (rms: without mean(g))
//     grad_input = keep / (1 - p) grad_h,  grad_residual = grad_h,  grad_w = sum_rows(grad_output x),  grad_b =
//     sum_rows(grad_output)
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

struct NormForward {
  TensorView input;         // (rows, columns), unit column stride
  TensorView residual;      // like input, or none
  TensorView weight, bias;  // (columns,), or none
  TensorView seed;          // int64 (1,), where dropout_p > 0
  double eps = 0.0, dropout_p = 0.0;
  bool subtract_mean = true;        // layer norm; false is rms norm
  TensorView output, new_residual;  // like input; new_residual only with a residual
  TensorView mean, rstd;            // float32 (rows,); mean only for layer norm

  static constexpr auto fields() {
    using P = NormForward;
    return std::tuple{field("input", &P::input),         field("residual", &P::residual),
                      field("weight", &P::weight),       field("bias", &P::bias),
                      field("seed", &P::seed),           field("eps", &P::eps),
                      field("dropout_p", &P::dropout_p), field("subtract_mean", &P::subtract_mean),
                      field("output", &P::output),       field("new_residual", &P::new_residual),
                      field("mean", &P::mean),           field("rstd", &P::rstd)};
  }
};

struct NormBackward {
  TensorView grad_output;        // (rows, columns)
  TensorView grad_new_residual;  // like it, or none
  TensorView h;                  // what was normalised
  TensorView weight, mean, rstd, seed;
  double dropout_p = 0.0;
  bool subtract_mean = true;
  TensorView grad_input, grad_residual;  // like h; grad_residual only where dropout makes it differ
  TensorView grad_weight, grad_bias;     // float32 (columns,), or none where not wanted

  static constexpr auto fields() {
    using P = NormBackward;
    return std::tuple{field("grad_output", &P::grad_output),
                      field("grad_new_residual", &P::grad_new_residual),
                      field("h", &P::h),
                      field("weight", &P::weight),
                      field("mean", &P::mean),
                      field("rstd", &P::rstd),
                      field("seed", &P::seed),
                      field("dropout_p", &P::dropout_p),
                      field("subtract_mean", &P::subtract_mean),
                      field("grad_input", &P::grad_input),
                      field("grad_residual", &P::grad_residual),
                      field("grad_weight", &P::grad_weight),
                      field("grad_bias", &P::grad_bias)};
  }
};

inline void check_norm_seed(const Checker& at, const TensorView& seed, double dropout_p) {
  at.probability(dropout_p, "dropout_p");
  if (dropout_p > 0) at.defined(seed, "seed");
  at.dtype(seed, "seed", {DType::i64});
  at.shape(seed, "seed", {1});
}

// `floats`: what a backend computes with; without it, what every backend does.
inline void validate(const NormForward& p, std::initializer_list<DType> floats = {DType::f32, DType::bf16}) {
  const Checker at{p.subtract_mean ? "layer_norm" : "rms_norm"};
  at.defined(p.input, "input");
  at.dtype(p.input, "input", floats);
  if (p.input.ndim != 2) at.fail_at("input", "must be (rows, columns), got " + p.input.shape());
  const int64_t rows = p.input.size(0), columns = p.input.size(1);
  for (auto [t, argument] :
       NamedTensors{{&p.residual, "residual"}, {&p.output, "output"}, {&p.new_residual, "new_residual"}}) {
    at.dtype(*t, argument, {p.input.dtype});
    at.shape(*t, argument, {rows, columns});
    at.unit_last_stride(*t, argument);
  }
  at.unit_last_stride(p.input, "input");
  at.defined(p.output, "output");
  if (p.residual.defined()) at.defined(p.new_residual, "new_residual");
  for (auto [t, argument] : NamedTensors{{&p.weight, "weight"}, {&p.bias, "bias"}}) {
    at.dtype(*t, argument, floats);
    at.shape(*t, argument, {columns});
    at.contiguous(*t, argument);
  }
  for (auto [t, argument] : NamedTensors{{&p.mean, "mean"}, {&p.rstd, "rstd"}}) {
    at.dtype(*t, argument, {DType::f32});
    at.shape(*t, argument, {rows});
    at.contiguous(*t, argument);
  }
  at.defined(p.rstd, "rstd");
  if (p.subtract_mean) at.defined(p.mean, "mean");
  check_norm_seed(at, p.seed, p.dropout_p);
}

inline void validate(const NormBackward& p, std::initializer_list<DType> floats = {DType::f32, DType::bf16}) {
  const Checker at{p.subtract_mean ? "layer_norm backward" : "rms_norm backward"};
  at.defined(p.h, "h");
  at.dtype(p.h, "h", floats);
  if (p.h.ndim != 2) at.fail_at("h", "must be (rows, columns), got " + p.h.shape());
  const int64_t rows = p.h.size(0), columns = p.h.size(1);
  for (auto [t, argument] : NamedTensors{{&p.grad_output, "grad_output"},
                                         {&p.grad_new_residual, "grad_new_residual"},
                                         {&p.grad_input, "grad_input"},
                                         {&p.grad_residual, "grad_residual"},
                                         {&p.h, "h"}}) {
    at.dtype(*t, argument, {p.h.dtype});
    at.shape(*t, argument, {rows, columns});
    at.unit_last_stride(*t, argument);
  }
  at.defined(p.grad_output, "grad_output");
  at.defined(p.grad_input, "grad_input");
  at.dtype(p.weight, "weight", floats);
  at.shape(p.weight, "weight", {columns});
  at.contiguous(p.weight, "weight");
  for (auto [t, argument] : NamedTensors{{&p.mean, "mean"}, {&p.rstd, "rstd"}}) {
    at.dtype(*t, argument, {DType::f32});
    at.shape(*t, argument, {rows});
    at.contiguous(*t, argument);
  }
  at.defined(p.rstd, "rstd");
  if (p.subtract_mean) at.defined(p.mean, "mean");
  for (auto [t, argument] : NamedTensors{{&p.grad_weight, "grad_weight"}, {&p.grad_bias, "grad_bias"}}) {
    at.dtype(*t, argument, {DType::f32});
    at.shape(*t, argument, {columns});
    at.contiguous(*t, argument);
  }
  check_norm_seed(at, p.seed, p.dropout_p);
}

}  // namespace llmengine::ops
