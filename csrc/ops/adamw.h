// One step of AdamW (Loshchilov & Hutter 2019; amsgrad: Reddi et al. 2018) over a list of parameters, in place.
//
//   t = step + 1, which is stored; g = gradient, times `multiplier`, negated where the objective is maximised
//   w <- w - lr decay w
//   m <- m + (1 - beta1) (g - m)
//   v <- beta2 v + (1 - beta2) g^2                       amsgrad: u = peak <- max(peak, v), otherwise u = v
//   w <- w - lr / (1 - beta1^t) m / (sqrt(u) / sqrt(1 - beta2^t) + eps)
//
// w is the float32 master where there are masters, and the parameter is its rounding; otherwise w is the parameter.
// Arithmetic is float. What is stored in 16 bits is rounded to nearest or, where `stochastic`, to either neighbour with
// probabilities that make its expectation exact: the 32 bits of the float, plus a 16-bit draw, lose their lower half.
// The draws (ops/philox.h): row = 2^32 t + the parameter's number, column = the element's index;
//   stream 0: weight (low half of the word) and m (high half); stream 1: v and peak
// so that an element's rounding depends on seed, step and place alone. Where *found_inf is not 0 nothing changes.
#pragma once

#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"
#include "ops/tensor_list.h"

namespace llmengine::ops {

struct AdamW {
  TensorList parameters;             // contiguous, all of one dtype, of any shapes
  TensorList gradients;              // like parameters, or all float32
  TensorList exp_avgs, exp_avg_sqs;  // m and v: like parameters; float32 or all bfloat16
  TensorList max_exp_avg_sqs;        // peak: like v; empty without amsgrad
  TensorList masters;                // float32, or empty
  TensorList steps;                  // float32 ()
  std::vector<int64_t> numbers;      // of the parameters, for draws
  TensorView lr;                     // float32 or float64 ()
  TensorView multiplier;             // float32 (), or none: 1
  TensorView found_inf;              // float32 (), or none: 0
  double beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  bool maximize = false, stochastic = false;
  int64_t seed = 0;

  static constexpr auto fields() {
    using P = AdamW;
    return std::tuple{field("parameters", &P::parameters),
                      field("gradients", &P::gradients),
                      field("exp_avgs", &P::exp_avgs),
                      field("exp_avg_sqs", &P::exp_avg_sqs),
                      field("max_exp_avg_sqs", &P::max_exp_avg_sqs),
                      field("masters", &P::masters),
                      field("steps", &P::steps),
                      field("numbers", &P::numbers),
                      field("lr", &P::lr),
                      field("multiplier", &P::multiplier),
                      field("found_inf", &P::found_inf),
                      field("beta1", &P::beta1),
                      field("beta2", &P::beta2),
                      field("eps", &P::eps),
                      field("weight_decay", &P::weight_decay),
                      field("maximize", &P::maximize),
                      field("stochastic", &P::stochastic),
                      field("seed", &P::seed)};
  }
};

// All but the learning rate, which may be elsewhere; `floats`: of parameters and moments.
inline void validate_lists(const AdamW& p, std::initializer_list<DType> floats) {
  const Checker at{"adamw"};
  validate_list(at, p.parameters, "parameters", p.parameters, floats);
  if (p.parameters.empty()) return;
  const DType dtype = p.parameters[0].dtype;
  validate_list(at, p.gradients, "gradients", p.parameters, {dtype, DType::f32});
  validate_list(at, p.exp_avgs, "exp_avgs", p.parameters, floats);
  const DType moments = p.exp_avgs[0].dtype;
  validate_list(at, p.exp_avg_sqs, "exp_avg_sqs", p.parameters, {moments});
  if (!p.max_exp_avg_sqs.empty()) {
    validate_list(at, p.max_exp_avg_sqs, "max_exp_avg_sqs", p.parameters, {moments});
  }
  if (!p.masters.empty()) validate_list(at, p.masters, "masters", p.parameters, {DType::f32});
  if (p.steps.size() != p.parameters.size()) at.fail_at("steps", "must be as many as parameters");
  if (p.numbers.size() != p.parameters.size()) at.fail_at("numbers", "must be as many as parameters");
  const auto scalar = [&](const TensorView& t, const char* name, std::initializer_list<DType> allowed) {
    at.dtype(t, name, allowed);
    if (t.defined() && t.numel() != 1) at.fail_at(name, "has shape " + t.shape() + "; expected one element");
  };
  for (const TensorView& step : p.steps) {
    at.defined(step, "steps");
    scalar(step, "steps", {DType::f32});
  }
  scalar(p.lr, "lr", {DType::f32, DType::f64});
  scalar(p.multiplier, "multiplier", {DType::f32});
  scalar(p.found_inf, "found_inf", {DType::f32});
}

inline void validate(const AdamW& p) {
  validate_lists(p, {DType::f32, DType::bf16});
  if (!p.parameters.empty()) Checker{"adamw"}.defined(p.lr, "lr");
}

}  // namespace llmengine::ops
