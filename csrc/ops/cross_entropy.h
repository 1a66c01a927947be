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

struct CrossEntropyForward {
  TensorView input;   // (rows, classes), unit class stride
  TensorView target;  // int64 (rows,)
  TensorView weight;  // float32 (classes,), or none
  std::string reduction;
  int64_t ignore_index = -100;
  double label_smoothing = 0.0, z_loss = 0.0, softcap = 0.0;
  TensorView losses, lse;       // float32 (rows,)
  TensorView loss, normaliser;  // float32 (); loss not for "none"

  static constexpr auto fields() {
    using P = CrossEntropyForward;
    return std::tuple{field("input", &P::input),
                      field("target", &P::target),
                      field("weight", &P::weight),
                      field("reduction", &P::reduction),
                      field("ignore_index", &P::ignore_index),
                      field("label_smoothing", &P::label_smoothing),
                      field("z_loss", &P::z_loss),
                      field("softcap", &P::softcap),
                      field("losses", &P::losses),
                      field("lse", &P::lse),
                      field("loss", &P::loss),
                      field("normaliser", &P::normaliser)};
  }
};

struct CrossEntropyBackward {
  TensorView grad_loss;  // float32, (rows,) for "none" (any stride, 0 too), otherwise ()
  TensorView input, target, weight, lse, normaliser;
  std::string reduction;
  int64_t ignore_index = -100;
  double label_smoothing = 0.0, z_loss = 0.0, softcap = 0.0;
  TensorView grad_input;  // like input

  static constexpr auto fields() {
    using P = CrossEntropyBackward;
    return std::tuple{field("grad_loss", &P::grad_loss),
                      field("input", &P::input),
                      field("target", &P::target),
                      field("weight", &P::weight),
                      field("lse", &P::lse),
                      field("normaliser", &P::normaliser),
                      field("reduction", &P::reduction),
                      field("ignore_index", &P::ignore_index),
                      field("label_smoothing", &P::label_smoothing),
                      field("z_loss", &P::z_loss),
                      field("softcap", &P::softcap),
                      field("grad_input", &P::grad_input)};
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

inline void check_cross_entropy_options(const Checker& at, const std::string& reduction, double label_smoothing,
                                        double z_loss, double softcap) {
  if (reduction != "none" && reduction != "mean" && reduction != "sum") {
    at.fail_at("reduction", "is '" + reduction + "'; allowed: 'none', 'mean', 'sum'");
  }
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) at.fail_at("label_smoothing", "must lie in [0, 1]");
  if (!(z_loss >= 0)) at.fail_at("z_loss", "must be at least 0");
  if (!(softcap >= 0)) at.fail_at("softcap", "must be at least 0");
}

// A float32 vector of the given shape that must be there.
inline void check_statistic(const Checker& at, const TensorView& t, const char* argument,
                            std::initializer_list<int64_t> shape) {
  at.defined(t, argument);
  at.dtype(t, argument, {DType::f32});
  at.shape(t, argument, shape);
  at.contiguous(t, argument);
}

inline void check_labels(const Checker& at, const TensorView& target, const TensorView& weight, int64_t rows,
                         int64_t classes) {
  at.defined(target, "target");
  at.dtype(target, "target", {DType::i64});
  at.shape(target, "target", {rows});
  at.contiguous(target, "target");
  if (weight.defined()) check_statistic(at, weight, "weight", {classes});
}

inline void check_logits(const Checker& at, const TensorView& input) {
  at.defined(input, "input");
  at.dtype(input, "input", {DType::f32, DType::bf16});
  if (input.ndim != 2) at.fail_at("input", "must be (rows, classes), got " + input.shape());
  at.unit_last_stride(input, "input");
}

inline void validate(const CrossEntropyForward& p) {
  const Checker at{"cross_entropy"};
  check_logits(at, p.input);
  const int64_t rows = p.input.size(0);
  check_labels(at, p.target, p.weight, rows, p.input.size(1));
  check_cross_entropy_options(at, p.reduction, p.label_smoothing, p.z_loss, p.softcap);
  check_statistic(at, p.losses, "losses", {rows});
  check_statistic(at, p.lse, "lse", {rows});
  check_statistic(at, p.normaliser, "normaliser", {});
  if (p.reduction != "none") check_statistic(at, p.loss, "loss", {});
}

inline void validate(const CrossEntropyBackward& p) {
  const Checker at{"cross_entropy backward"};
  check_logits(at, p.input);
  const int64_t rows = p.input.size(0), classes = p.input.size(1);
  check_labels(at, p.target, p.weight, rows, classes);
  check_cross_entropy_options(at, p.reduction, p.label_smoothing, p.z_loss, p.softcap);
  check_statistic(at, p.lse, "lse", {rows});
  check_statistic(at, p.normaliser, "normaliser", {});
  at.defined(p.grad_loss, "grad_loss");
  at.dtype(p.grad_loss, "grad_loss", {DType::f32});
  if (p.reduction == "none") {
    at.shape(p.grad_loss, "grad_loss", {rows});
  } else {
    at.shape(p.grad_loss, "grad_loss", {});
  }
  at.defined(p.grad_input, "grad_input");
  at.dtype(p.grad_input, "grad_input", {p.input.dtype});
  at.shape(p.grad_input, "grad_input", {rows, classes});
  at.unit_last_stride(p.grad_input, "grad_input");
}

}  // namespace llmengine::ops
