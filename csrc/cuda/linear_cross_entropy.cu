// Cross-entropy of a linear layer, forward and backward, whose logits end in the registers that they are made in
// (formulas: ops/linear_cross_entropy.h, ops/cross_entropy.h; Wijmans et al. 2024). Products, and what they end in:
// linear_cross_entropy_{sm80,sm90a}.cu, linear_cross_entropy_products.cuh.
//
//              span of classes
//          +-------+-------+-------+---   A block of the forward owns a tile of tokens and a span of the classes, one
//   tokens |   z   |   z   |   z   |      tile after the other. The sums of a tile are logits, which join what is known
//          +-------+-------+-------+---   of each token: the largest, the sum of exponentials below it, with label
//          |   z   |   z   |   z   |      smoothing the sum of w z. The thread that meets a token's own class writes
//          +-------+-------+-------+---   its logit.
//
//   forward    logits_of_span, then linear_cross_entropy_merge: the spans of a token in order, its loss and lse;
//              cross_entropy_sum (cross_entropy.cu)
//   backward   a block of K classes after the other, and of each a block of T tokens after the other, as many as the
//              given block has room for: logits_gradient forms their logits again and, in the epilogue, from lse their
//              gradient dz (the target's share taken off in float32), with its sums over 64 tokens for the bias; then
//              grad_input += dz weight of these tokens and grad_linear_weight += dz^T input of these classes, each by
//              gemm.cu
//
//   Of a shard of the classes the merge ends in `statistics`, and `factors` are given.
//
//   No atomics: every sum has its order.
//
//   flops      2 tokens d classes forward, 6 backward
//   memory     of the backward: 2 T K of dz; of gradients in 16 bits, whose sums lie in themselves and a byte beside
//              each element (gemm.h), d a token and d a class of a block. 8192 x 4096 x 128256, T 4096, K 2048: 16 + 32
//              + 8 = 56 MiB, 0.93 % of the 6012 MiB in which the unfused path has logits, softmax and gradient. 8192 x
//              2304 x 256000, T = K = 4096: 32 + 18 + 9 = 59 MiB, 0.49 %.
//   bytes      operands as products read them; 12 a token and span; backward 2 written and 4 read a logit, and 6 an
//              element of grad_input for each block of classes, of a block's grad_linear_weight for each one of tokens:
//              6 tokens d classes (1 / K + 1 / T - 1 / tokens). In the first example 15.8 GB, 4.7 ms at 3.35 TB/s,
//              beside 34.5 Tflop, 46 ms at 750 Tflop/s; T K of 2^25 would be 4 ms less and 48 MiB more.
//   limit      the tensor cores
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "cuda/cross_entropy.h"
#include "cuda/gemm.h"
#include "cuda/gemm_cores.h"
#include "cuda/gemm_host.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/linear_cross_entropy_products.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

constexpr int kMergeThreads = 128;

// ---- the spans of a token -------------------------------------------------------------------------------------------

struct Merge {
  const float *partial, *target_logits;
  LossOptions options;
  int tokens, spans;
  float *losses, *lse;
  float* statistics;  // of a shard, (4, tokens): instead of these two
};

__global__ void __launch_bounds__(kMergeThreads) linear_cross_entropy_merge(const Merge p) {
  const int token = static_cast<int>(blockIdx.x * kMergeThreads + threadIdx.x);
  if (token >= p.tokens) return;
  const int64_t label = p.options.target[token];
  const auto tell = [&](float largest, float total, float of_target, float weighted) {
    float* to = p.statistics + token;
    const int64_t next = p.tokens;
    to[0] = largest, to[next] = total, to[2 * next] = of_target, to[3 * next] = weighted;
  };
  if (label == p.options.ignore_index) {
    if (p.statistics) return tell(-INFINITY, 0.0f, 0.0f, 0.0f);
    p.losses[token] = p.lse[token] = 0.0f;
    return;
  }
  float largest = -INFINITY, total = 0.0f, weighted = 0.0f;
  for (int span = 0; span < p.spans; ++span) {
    const float* part = p.partial + static_cast<int64_t>(span) * 3 * p.tokens + token;
    const float higher = fmaxf(largest, part[0]);
    total = total * exp_below(largest, higher) + part[p.tokens] * exp_below(part[0], higher);
    weighted += part[2 * static_cast<int64_t>(p.tokens)];
    largest = higher;
  }
  if (p.statistics) return tell(largest, total, p.target_logits[token], weighted);
  const float of_target = p.options.is_class(label) ? p.target_logits[token] : NAN, log_total = logf(total);
  p.losses[token] = loss_of(p.options, label, largest, log_total, of_target, weighted);
  p.lse[token] = largest + log_total;
}

// ---- the host -------------------------------------------------------------------------------------------------------

constexpr ops::LinearCrossEntropyTypes kTypes = {kProductTypes, true};

// Columns [0, count) of a matrix.
TensorView columns_up_to(TensorView t, int64_t count) {
  t.sizes[1] = count;
  return t;
}

// What the gradient of a part of the logits gives to those of input and weight.
void multiply_part(const LinearCrossEntropyBackward& p, const LogitsPart& part, Stream stream) {
  const auto& [token, tokens, first, classes] = part;
  const TensorView grad = columns_up_to(rows_from(p.block, 0, tokens), classes);
  const TensorView input = rows_from(p.input, token, tokens), weight = rows_from(p.linear_weight, first, classes);
  Gemm product{};
  product.room = p.room, product.core = p.core;
  if (p.grad_input.defined()) {
    product.a = grad, product.b = weight;
    product.out = rows_from(p.grad_input, token, tokens), product.low = rows_from(p.low_input, token, tokens);
    product.goes_on = first > 0, product.ends = first + classes == p.linear_weight.size(0);
    run(product, stream);
  }
  if (p.grad_linear_weight.defined()) {
    product.a = transposed(grad), product.b = input;
    product.out = rows_from(p.grad_linear_weight, first, classes), product.low = rows_from(p.low_weight, 0, classes);
    product.goes_on = token > 0, product.ends = token + tokens == p.input.size(0);
    if (product.out.dtype == DType::f32) {
      if (product.goes_on || p.add_linear_weight) product.added = product.out;
      product.goes_on = false, product.ends = true;
    }
    run(product, stream);
  }
}

// The bias's gradient of a block of classes, once all tokens have given theirs.
void add_bias(const LinearCrossEntropyBackward& p, int64_t first, int64_t classes, Stream stream) {
  TensorView sums = p.grad_linear_bias;
  sums.data = sums.as<float>() + first, sums.sizes[0] = classes;
  run(ColumnSums{columns_up_to(p.partial_bias, classes), {}, sums}, stream);
}

void check_rooms(const Checker& at, const LinearCrossEntropyForward& p) {
  check_core(at, p.core, {});
  check_weight_sum(at, p, p.weight_sum);
  const int64_t tokens = p.input.size(0);
  at.defined(p.partial, "partial");
  at.dtype(p.partial, "partial", {DType::f32});
  if (p.partial.ndim != 3 || p.partial.size(0) < 1) {
    at.fail_at("partial", "must be (spans, 3, tokens), got " + p.partial.shape());
  }
  at.shape(p.partial, "partial", {p.partial.size(0), 3, tokens});
  at.contiguous(p.partial, "partial");
  ops::check_statistic(at, p.target_logits, "target_logits", {tokens});
}

void check_rooms(const Checker& at, const LinearCrossEntropyBackward& p) {
  check_weight_sum(at, p, p.weight_sum);
  check_core(at, p.core, p.room);
  const int64_t tokens = p.input.size(0), d = p.input.size(1), at_once = p.block.ndim == 2 ? p.block.size(0) : 0;
  at.defined(p.block, "block");
  at.dtype(p.block, "block", {p.input.dtype});
  if (p.block.ndim != 2 || (at_once < tokens && (at_once < 1 || at_once % gemm::kTile != 0)) || p.block.size(1) < 1 ||
      p.block.size(1) % gemm::kTile != 0) {
    at.fail_at("block", "must be (all tokens or a multiple of " + std::to_string(gemm::kTile) + ", a multiple of " +
                            std::to_string(gemm::kTile) + "), got " + p.block.shape());
  }
  at.contiguous(p.block, "block");
  const auto check_low = [&](const TensorView& low, const char* argument, int64_t rows) {
    at.defined(low, argument);
    at.dtype(low, argument, {DType::boolean});
    at.shape(low, argument, {rows, d});
    at.contiguous(low, argument);
  };
  if (p.grad_input.defined() && p.block.size(1) < p.linear_weight.size(0)) check_low(p.low_input, "low_input", tokens);
  const TensorView& weight = p.grad_linear_weight;
  if (weight.defined() && weight.dtype != DType::f32 && at_once < tokens) {
    check_low(p.low_weight, "low_weight", p.block.size(1));
  }
  if (p.grad_linear_bias.defined()) {
    ops::check_statistic(at, p.partial_bias, "partial_bias", {2 * gemm::tiles_of(tokens), p.block.size(1)});
  }
}

}  // namespace

void validate(const LinearCrossEntropyForward& p) {
  ops::validate(p, kTypes);
  check_rooms({"linear_cross_entropy"}, p);
}

void validate(const LinearCrossEntropyShardForward& p) {
  ops::validate(p, kTypes);
  check_rooms({"linear_cross_entropy of a shard"}, p);
}

void validate(const LinearCrossEntropyBackward& p) {
  const Checker at{"linear_cross_entropy backward"};
  ops::check_linear_backward(at, p, kTypes);
  ops::check_loss_of_whole(at, p);
  check_rooms(at, p);
}

void validate(const LinearCrossEntropyShardBackward& p) {
  const Checker at{"linear_cross_entropy of a shard backward"};
  ops::check_linear_backward(at, p, kTypes);
  ops::check_loss_of_shard(at, p);
  check_rooms(at, p);
}

void run(const LinearCrossEntropyForward& p, Stream stream) {
  const int64_t tokens = p.input.size(0), classes = p.linear_weight.size(0);
  gemm::check_sizes("linear_cross_entropy", {tokens, classes, p.input.size(1)});
  const LossOptions options = options_of(p, p.weight_sum, static_cast<int>(classes));
  int spans = 0;
  if (tokens > 0) {
    const bool hopper = hopper_refuses(p.core, {{&p.input, "input"}, {&p.linear_weight, "linear_weight"}}).empty();
    spans = hopper ? logits_of_spans_sm90a(p, stream) : logits_of_spans_sm80(p, stream);
  }
  const Merge merge{p.partial.as<float>(),
                    p.target_logits.as<float>(),
                    options,
                    static_cast<int>(tokens),
                    spans,
                    p.losses.as<float>(),
                    p.lse.as<float>(),
                    p.statistics.as<float>()};
  const LaunchSite at{"linear_cross_entropy_merge", dim3(grid_of(tokens, kMergeThreads)), dim3(kMergeThreads),
                      cuda_stream(stream), p.input};
  launch(at, linear_cross_entropy_merge, merge);
  if (!p.statistics.defined()) add_losses(p, p.losses, p.loss, static_cast<int>(classes), stream);
}

void run(const LinearCrossEntropyBackward& p, Stream stream) {
  const int64_t tokens = p.input.size(0), classes = p.linear_weight.size(0);
  gemm::check_sizes("linear_cross_entropy backward", {tokens, classes, p.input.size(1)});
  for (int64_t first = 0; first < classes; first += p.block.size(1)) {
    const int64_t count = std::min(p.block.size(1), classes - first);
    const TensorView weight = rows_from(p.linear_weight, first, count);
    const bool hopper = tokens > 0 && hopper_refuses(p.core, {{&p.input, "input"}, {&weight, "linear_weight"}}).empty();
    int64_t token = 0;
    do {  // of no tokens, too: gradients are then zeros
      const LogitsPart part{token, std::min(p.block.size(0), tokens - token), first, count};
      hopper ? logits_gradient_sm90a(p, part, stream) : logits_gradient_sm80(p, part, stream);
      multiply_part(p, part, stream);
      token += part.tokens;
    } while (token < tokens);
    if (p.grad_linear_bias.defined()) add_bias(p, first, count, stream);
  }
}

}  // namespace llmengine::cuda
