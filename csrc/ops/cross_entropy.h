// Cross-entropy of rows of logits against class indices, with label smoothing (Szegedy et al. 2016), class weights w,
// z-loss (Chowdhery et al. 2022, PaLM) and a softcap on the logits (Gemma 2).
//
//   z = x, or softcap tanh(x / softcap);  lse = log sum_c exp z_c;  p_c = exp(z_c - lse);  e = label_smoothing
//   loss of a row of class y:  (1 - e) w_y (lse - z_y) + e / C sum_c w_c (lse - z_c) + z_loss lse^2
//   a row of class ignore_index has loss 0 and gradient 0
//   reduction: none; sum; mean = sum / (sum of w_y over the other rows), 0 where that is 0
//
//   backward:  dloss / dz_c = p_c ((1 - e) w_y + e / C sum w + 2 z_loss lse) - e / C w_c - [c = y] (1 - e) w_y
//              dz_c / dx_c = 1 - tanh^2(x / softcap)
//
// TokenLoss holds what happens to a row once its lse is known: shared with linear cross-entropy.
#pragma once

#include <string>

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

// What both losses, of logits and of a linear layer's (ops/linear_cross_entropy.h), are given beside their operands.
struct CrossEntropyOptions {
  TensorView target;  // int64 (rows,)
  TensorView weight;  // float32 (classes,), or none
  std::string reduction;
  int64_t ignore_index = -100;
  double label_smoothing = 0.0, z_loss = 0.0, softcap = 0.0;
  TensorView lse, normaliser;  // float32 (rows,) and ()

  static constexpr auto fields() {
    using P = CrossEntropyOptions;
    return std::tuple{field("target", &P::target),
                      field("weight", &P::weight),
                      field("reduction", &P::reduction),
                      field("ignore_index", &P::ignore_index),
                      field("label_smoothing", &P::label_smoothing),
                      field("z_loss", &P::z_loss),
                      field("softcap", &P::softcap),
                      field("lse", &P::lse),
                      field("normaliser", &P::normaliser)};
  }
};

struct CrossEntropyForward : CrossEntropyOptions {
  TensorView input;   // (rows, classes), unit class stride
  TensorView losses;  // float32 (rows,)
  TensorView loss;    // float32 (); not for "none"

  static constexpr auto fields() {
    using P = CrossEntropyForward;
    return std::tuple_cat(CrossEntropyOptions::fields(),
                          std::tuple{field("input", &P::input), field("losses", &P::losses), field("loss", &P::loss)});
  }
};

struct CrossEntropyBackward : CrossEntropyOptions {
  TensorView grad_loss;  // float32, (rows,) for "none" (any stride, 0 too), otherwise ()
  TensorView input;
  TensorView grad_input;  // like input

  static constexpr auto fields() {
    using P = CrossEntropyBackward;
    return std::tuple_cat(
        CrossEntropyOptions::fields(),
        std::tuple{field("grad_loss", &P::grad_loss), field("input", &P::input), field("grad_input", &P::grad_input)});
  }
};

// The loss of one row, and the three numbers that make its gradient, from its log-sum-exp.
struct TokenLoss {
  const float* weight;  // (classes,), or null: all 1
  int64_t classes;
  double label_smoothing, z_loss;
  double weight_sum;  // over the classes

  TokenLoss(const TensorView& class_weight, int64_t class_count, double smoothing, double z)
      : weight(class_weight.defined() ? class_weight.as<float>() : nullptr),
        classes(class_count),
        label_smoothing(smoothing),
        z_loss(z),
        weight_sum(static_cast<double>(class_count)) {
    if (!weight) return;
    weight_sum = 0.0;
    for (int64_t c = 0; c < classes; ++c) weight_sum += weight[c];
  }

  double weight_of(int64_t target) const { return weight ? weight[target] : 1.0; }
  // e / C: multiplied by w_c it is what smoothing takes from every class
  double smoothing_share() const { return label_smoothing > 0 ? label_smoothing / static_cast<double>(classes) : 0.0; }

  // target_logit: z_y; weighted_logits: sum_c w_c z_c, looked at only with label smoothing
  float value(int64_t target, double lse, double target_logit, double weighted_logits) const {
    double loss = (1.0 - label_smoothing) * weight_of(target) * (lse - target_logit);
    if (label_smoothing > 0) loss += smoothing_share() * (weight_sum * lse - weighted_logits);
    if (z_loss > 0) loss += z_loss * lse * lse;
    return static_cast<float>(loss);
  }

  // dloss / dz_c = p_c probability - w_c smoothing - [c = y] target
  struct Gradient {
    float probability, smoothing, target;
  };
  Gradient gradient(int64_t target, double lse, double upstream) const {
    const double picked = (1.0 - label_smoothing) * weight_of(target), share = smoothing_share();
    const double z = z_loss > 0 ? 2.0 * z_loss * lse : 0.0;
    return {static_cast<float>(upstream * (picked + share * weight_sum + z)), static_cast<float>(upstream * share),
            static_cast<float>(upstream * picked)};
  }

  // False for a row without a label; an error (ValueError in Python) for a target that is no class.
  bool labelled(const char* op, int64_t target, int64_t row, int64_t ignore_index) const {
    if (target == ignore_index) return false;
    if (target >= 0 && target < classes) return true;
    fail(std::string(op) + ": target " + std::to_string(target) + " at row " + std::to_string(row) +
         " is out of range; allowed: 0 to " + std::to_string(classes - 1) + " (" + std::to_string(classes) +
         " classes) or ignore_index " + std::to_string(ignore_index));
  }
};

// A float32 vector of the given shape that must be there.
inline void check_statistic(const Checker& at, const TensorView& t, const char* argument,
                            std::initializer_list<int64_t> shape) {
  at.defined(t, argument);
  at.dtype(t, argument, {DType::f32});
  at.shape(t, argument, shape);
  at.contiguous(t, argument);
}

inline void check_cross_entropy_options(const Checker& at, const CrossEntropyOptions& p, int64_t rows,
                                        int64_t classes) {
  at.defined(p.target, "target");
  at.dtype(p.target, "target", {DType::i64});
  at.shape(p.target, "target", {rows});
  at.contiguous(p.target, "target");
  if (p.weight.defined()) check_statistic(at, p.weight, "weight", {classes});
  if (p.reduction != "none" && p.reduction != "mean" && p.reduction != "sum") {
    at.fail_at("reduction", "is '" + p.reduction + "'; allowed: 'none', 'mean', 'sum'");
  }
  if (!(p.label_smoothing >= 0 && p.label_smoothing <= 1)) at.fail_at("label_smoothing", "must lie in [0, 1]");
  if (!(p.z_loss >= 0)) at.fail_at("z_loss", "must be at least 0");
  if (!(p.softcap >= 0)) at.fail_at("softcap", "must be at least 0");
}

// What a forward leaves for the backward.
inline void check_known(const Checker& at, const CrossEntropyOptions& p, int64_t rows) {
  check_statistic(at, p.lse, "lse", {rows});
  check_statistic(at, p.normaliser, "normaliser", {});
}

// grad_loss: one number a row where losses are not reduced, else one.
inline void check_grad_loss(const Checker& at, const TensorView& grad_loss, const CrossEntropyOptions& p) {
  at.defined(grad_loss, "grad_loss");
  at.dtype(grad_loss, "grad_loss", {DType::f32});
  if (p.reduction == "none") {
    at.shape(grad_loss, "grad_loss", {p.target.size(0)});
  } else {
    at.shape(grad_loss, "grad_loss", {});
  }
}

inline void check_logits(const Checker& at, const TensorView& input, std::initializer_list<DType> dtypes) {
  at.defined(input, "input");
  at.dtype(input, "input", dtypes);
  if (input.ndim != 2) at.fail_at("input", "must be (rows, classes), got " + input.shape());
  at.unit_last_stride(input, "input");
}

inline void validate(const CrossEntropyForward& p, std::initializer_list<DType> dtypes = {DType::f32, DType::bf16}) {
  const Checker at{"cross_entropy"};
  check_logits(at, p.input, dtypes);
  const int64_t rows = p.input.size(0);
  check_cross_entropy_options(at, p, rows, p.input.size(1));
  check_known(at, p, rows);
  check_statistic(at, p.losses, "losses", {rows});
  if (p.reduction != "none") check_statistic(at, p.loss, "loss", {});
}

inline void validate(const CrossEntropyBackward& p, std::initializer_list<DType> dtypes = {DType::f32, DType::bf16}) {
  const Checker at{"cross_entropy backward"};
  check_logits(at, p.input, dtypes);
  const int64_t rows = p.input.size(0), classes = p.input.size(1);
  check_cross_entropy_options(at, p, rows, classes);
  check_known(at, p, rows);
  check_grad_loss(at, p.grad_loss, p);
  at.defined(p.grad_input, "grad_input");
  at.dtype(p.grad_input, "grad_input", {p.input.dtype});
  at.shape(p.grad_input, "grad_input", {rows, classes});
  at.unit_last_stride(p.grad_input, "grad_input");
}

}  // namespace llmengine::ops
