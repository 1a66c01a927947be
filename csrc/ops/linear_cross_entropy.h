// Cross-entropy (ops/cross_entropy.h) of the logits x = input linear_weight^T + linear_bias, which are never held whole
// (Wijmans et al. 2024, "Cut your losses in large-vocabulary language models").
//
//   Tokens without a label enter no product on CPUs, and with gradients of 0 elsewhere. The forward keeps lse, one
//   number a token; the backward forms the logits again, block by block, and from them dx = dloss / dx: grad_input = dx
//   linear_weight,  grad_linear_weight = dx^T input,  grad_linear_bias = sum over tokens of dx
//
//   Where processes have the classes by shards, each is given the rows of linear_weight that it has, and `target`
//   counts from the first of them: what is none of its classes, but for ignore_index, is another shard's. The forward
//   then gives `statistics`, what the shard's logits tell of each token; who has put the shards' together knows lse and
//   the factors that make up dx.
#pragma once

#include <string>

#include "ops/cross_entropy.h"

namespace llmengine::ops {

struct LinearCrossEntropyOptions : CrossEntropyOptions {
  TensorView input;          // (tokens, d)
  TensorView linear_weight;  // (classes, d)
  TensorView linear_bias;    // (classes,), or none

  static constexpr auto fields() {
    using P = LinearCrossEntropyOptions;
    return std::tuple_cat(CrossEntropyOptions::fields(),
                          std::tuple{field("input", &P::input), field("linear_weight", &P::linear_weight),
                                     field("linear_bias", &P::linear_bias)});
  }
  static constexpr auto shard_fields() {
    using P = LinearCrossEntropyOptions;
    return std::tuple{field("input", &P::input),
                      field("linear_weight", &P::linear_weight),
                      field("linear_bias", &P::linear_bias),
                      field("target", &P::target),
                      field("weight", &P::weight),
                      field("ignore_index", &P::ignore_index),
                      field("label_smoothing", &P::label_smoothing),
                      field("softcap", &P::softcap)};
  }
};

struct LinearCrossEntropyForward : LinearCrossEntropyOptions {
  TensorView losses;  // float32 (tokens,); 0 without a label, as lse is
  TensorView loss;    // float32 (); not for "none"
  // of a shard alone, in the place of all others, float32 (4, tokens): the largest z, sum of exp(z - largest), z of the
  // target (0: another shard's), with label smoothing sum of w z; without a label -inf, 0, 0, 0
  TensorView statistics;

  static constexpr auto fields() {
    using P = LinearCrossEntropyForward;
    return std::tuple_cat(LinearCrossEntropyOptions::fields(),
                          std::tuple{field("losses", &P::losses), field("loss", &P::loss)});
  }
};

struct LinearCrossEntropyBackward : LinearCrossEntropyOptions {
  TensorView grad_loss;  // float32, (tokens,) for "none" (any stride, 0 too), otherwise ()
  TensorView sums;       // float32 (tokens, d): where grad_input gathers before it is rounded; may be grad_input itself
  // like their tensors, that of the bias float32; none: not wanted
  TensorView grad_input, grad_linear_weight, grad_linear_bias;
  bool add_linear_weight = false;  // grad_linear_weight is float32, and what it holds grows by the gradient
  // of a shard alone, float32 (3, tokens): dloss / dz_c = p_c factors[0] - w_c factors[1] - [c = target] factors[2]
  TensorView factors;

  static constexpr auto gradient_fields() {
    using P = LinearCrossEntropyBackward;
    return std::tuple{field("sums", &P::sums), field("grad_input", &P::grad_input),
                      field("grad_linear_weight", &P::grad_linear_weight),
                      field("grad_linear_bias", &P::grad_linear_bias),
                      field("add_linear_weight", &P::add_linear_weight)};
  }
  static constexpr auto fields() {
    return std::tuple_cat(LinearCrossEntropyOptions::fields(),
                          std::tuple{field("grad_loss", &LinearCrossEntropyBackward::grad_loss)}, gradient_fields());
  }
};

// The same of a shard.
template <class Forward>
struct LinearCrossEntropyShardForward : Forward {
  LinearCrossEntropyShardForward() { this->reduction = "none"; }

  static constexpr auto fields() {
    return std::tuple_cat(Forward::shard_fields(), std::tuple{field("statistics", &Forward::statistics)});
  }
};
template <class Backward>
struct LinearCrossEntropyShardBackward : Backward {
  LinearCrossEntropyShardBackward() { this->reduction = "none"; }

  static constexpr auto fields() {
    return std::tuple_cat(Backward::shard_fields(), Backward::gradient_fields(),
                          std::tuple{field("lse", &Backward::lse), field("factors", &Backward::factors)});
  }
};

// Loss and gradients (of the loss itself: grad_loss is 1) in one pass over the logits; not for "none", nor with a
// softcap, whose derivative would need the logits once more.
struct LinearCrossEntropyWithGradients : LinearCrossEntropyForward {
  TensorView block;  // like input (block tokens, classes rounded up to kClassBlock): the tokens taken at a time
  TensorView grad_input, grad_linear_weight, grad_linear_bias;  // as above

  static constexpr auto fields() {
    using P = LinearCrossEntropyWithGradients;
    return std::tuple_cat(LinearCrossEntropyForward::fields(),
                          std::tuple{field("block", &P::block), field("grad_input", &P::grad_input),
                                     field("grad_linear_weight", &P::grad_linear_weight),
                                     field("grad_linear_bias", &P::grad_linear_bias)});
  }
};
inline constexpr int64_t kClassBlock = 1536;

// What a backend takes. `rounded`: a weight in input's dtype alone, and its gradient in float32, too.
struct LinearCrossEntropyTypes {
  std::initializer_list<DType> input;
  bool rounded;
};
inline constexpr std::initializer_list<DType> kLinearCrossEntropyInputs = {DType::f32, DType::bf16};
inline constexpr LinearCrossEntropyTypes kLinearCrossEntropyTypes = {kLinearCrossEntropyInputs, false};

// What forward and backward have in common.
inline void check_linear_cross_entropy(const Checker& at, const LinearCrossEntropyOptions& p,
                                       const LinearCrossEntropyTypes& types = kLinearCrossEntropyTypes) {
  at.defined(p.input, "input");
  at.dtype(p.input, "input", types.input);
  if (p.input.ndim != 2) at.fail_at("input", "must be (tokens, d), got " + p.input.shape());
  at.unit_last_stride(p.input, "input");
  at.defined(p.linear_weight, "linear_weight");
  const DType wide = types.rounded ? p.input.dtype : DType::f32;
  at.dtype(p.linear_weight, "linear_weight", {p.input.dtype, wide});
  if (p.linear_weight.ndim != 2) {
    at.fail_at("linear_weight", "must be (classes, d), got " + p.linear_weight.shape());
  }
  const int64_t tokens = p.input.size(0), classes = p.linear_weight.size(0);
  at.shape(p.linear_weight, "linear_weight", {classes, p.input.size(1)});
  at.unit_last_stride(p.linear_weight, "linear_weight");
  at.dtype(p.linear_bias, "linear_bias", {p.input.dtype, DType::f32});
  at.shape(p.linear_bias, "linear_bias", {classes});
  at.contiguous(p.linear_bias, "linear_bias");
  check_cross_entropy_options(at, p, tokens, classes);
}

struct LinearGradients {
  const TensorView &input, &linear_weight, &linear_bias;
};

inline void check_linear_gradients(const Checker& at, const LinearCrossEntropyOptions& p, const LinearGradients& grad,
                                   const LinearCrossEntropyTypes& types = kLinearCrossEntropyTypes, bool add = false) {
  at.dtype(grad.input, "grad_input", {p.input.dtype});
  at.shape(grad.input, "grad_input", {p.input.size(0), p.input.size(1)});
  at.unit_last_stride(grad.input, "grad_input");
  const DType own = add ? DType::f32 : p.linear_weight.dtype, wide = types.rounded ? DType::f32 : own;
  at.dtype(grad.linear_weight, "grad_linear_weight", {own, wide});
  at.shape(grad.linear_weight, "grad_linear_weight", {p.linear_weight.size(0), p.input.size(1)});
  at.unit_last_stride(grad.linear_weight, "grad_linear_weight");
  if (grad.linear_bias.defined()) {
    check_statistic(at, grad.linear_bias, "grad_linear_bias", {p.linear_weight.size(0)});
  }
}

inline void validate(const LinearCrossEntropyForward& p,
                     const LinearCrossEntropyTypes& types = kLinearCrossEntropyTypes) {
  const Checker at{"linear_cross_entropy"};
  check_linear_cross_entropy(at, p, types);
  check_known(at, p, p.input.size(0));
  check_statistic(at, p.losses, "losses", {p.input.size(0)});
  if (p.reduction != "none") check_statistic(at, p.loss, "loss", {});
}

template <class Forward>
void validate(const LinearCrossEntropyShardForward<Forward>& p,
              const LinearCrossEntropyTypes& types = kLinearCrossEntropyTypes) {
  const Checker at{"linear_cross_entropy of a shard"};
  check_linear_cross_entropy(at, p, types);
  check_statistic(at, p.statistics, "statistics", {4, p.input.size(0)});
}

// What backwards of the whole and of a shard have in common.
inline void check_linear_backward(const Checker& at, const LinearCrossEntropyBackward& p,
                                  const LinearCrossEntropyTypes& types = kLinearCrossEntropyTypes) {
  check_linear_cross_entropy(at, p, types);
  const LinearGradients gradients{p.grad_input, p.grad_linear_weight, p.grad_linear_bias};
  check_linear_gradients(at, p, gradients, types, p.add_linear_weight);
}

inline void check_loss_of_whole(const Checker& at, const LinearCrossEntropyBackward& p) {
  check_known(at, p, p.input.size(0));
  check_grad_loss(at, p.grad_loss, p);
}

inline void check_loss_of_shard(const Checker& at, const LinearCrossEntropyBackward& p) {
  check_statistic(at, p.lse, "lse", {p.input.size(0)});
  check_statistic(at, p.factors, "factors", {3, p.input.size(0)});
}

inline void check_sums(const Checker& at, const LinearCrossEntropyBackward& p) {
  if (p.grad_input.defined()) check_statistic(at, p.sums, "sums", {p.input.size(0), p.input.size(1)});
}

inline void validate(const LinearCrossEntropyBackward& p) {
  const Checker at{"linear_cross_entropy backward"};
  check_linear_backward(at, p);
  check_loss_of_whole(at, p);
  check_sums(at, p);
}

inline void validate(const LinearCrossEntropyShardBackward<LinearCrossEntropyBackward>& p) {
  const Checker at{"linear_cross_entropy of a shard backward"};
  check_linear_backward(at, p);
  check_loss_of_shard(at, p);
  check_sums(at, p);
}

inline void validate(const LinearCrossEntropyWithGradients& p) {
  const Checker at{"linear_cross_entropy with gradients"};
  validate(static_cast<const LinearCrossEntropyForward&>(p));
  if (p.reduction == "none") at.fail_at("reduction", "is 'none'; allowed: 'mean', 'sum'");
  if (p.softcap > 0) at.fail_at("softcap", "must be 0");
  check_linear_gradients(at, p, {p.grad_input, p.grad_linear_weight, p.grad_linear_bias});
  at.defined(p.block, "block");
  at.dtype(p.block, "block", {p.input.dtype});
  const int64_t classes = p.linear_weight.size(0), wanted = (classes + kClassBlock - 1) / kClassBlock * kClassBlock;
  if (p.block.ndim != 2 || p.block.size(0) < 1 || p.block.size(1) != wanted) {
    at.fail_at("block", "must be (block tokens, " + std::to_string(wanted) + "), got " + p.block.shape());
  }
  at.contiguous(p.block, "block");
  const bool rounded = p.grad_linear_weight.defined() && p.grad_linear_weight.dtype != DType::f32;
  if (rounded && p.block.size(0) < p.input.size(0)) {
    at.fail_at("block", "must hold all " + std::to_string(p.input.size(0)) + " tokens where grad_linear_weight is " +
                            name(p.grad_linear_weight.dtype));
  }
}

}  // namespace llmengine::ops
