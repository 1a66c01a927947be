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
//   backward   for as many classes at a time as `block` has room for: logits_gradient forms their logits again and, in
//              the epilogue, from lse their gradient dz (the target's share taken off in float32), with its sums over
//              64 tokens for the bias; then grad_input += dz weight, in float32 between blocks, and grad_linear_weight
//              = dz^T input of these classes, each by gemm.cu
//
//   Of a shard of the classes the merge ends in `statistics`, and `factors` are given.
//
//   No atomics: every sum has its order.
//
//   flops      2 tokens d classes forward, 6 backward
//   bytes      operands as products read them; 12 a token and span; backward 2 written and 4 read a logit, and 8 an
//              element of grad_input for each block but the first and last: with 64 MiB a block, d = 4096 and 8192
//              tokens 0.27 GB beside 0.8 Tflop
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

// What the block's gradient gives to those of input, weight and bias.
void multiply_block(const LinearCrossEntropyBackward& p, int64_t first, int64_t count, Stream stream) {
  const bool last = first + count == p.linear_weight.size(0);
  const TensorView grad = columns_up_to(p.block, count);
  if (p.grad_input.defined()) {
    Gemm product{};
    product.room = p.room, product.core = p.core;
    product.a = grad, product.b = rows_from(p.linear_weight, first, count);
    if (first > 0) product.added = p.sums;
    product.out = last ? p.grad_input : p.sums;
    run(product, stream);
  }
  if (p.grad_linear_weight.defined()) {
    Gemm product{};
    product.room = p.room, product.core = p.core;
    product.a = transposed(grad), product.b = p.input;
    product.out = rows_from(p.grad_linear_weight, first, count);
    if (p.add_linear_weight) product.added = product.out;
    run(product, stream);
  }
  if (!p.grad_linear_bias.defined()) return;
  TensorView sums = p.grad_linear_bias;
  sums.data = sums.as<float>() + first, sums.sizes[0] = count;
  run(ColumnSums{columns_up_to(p.partial_bias, count), {}, sums}, stream);
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
  const int64_t tokens = p.input.size(0);
  at.defined(p.block, "block");
  at.dtype(p.block, "block", {p.input.dtype});
  if (p.block.ndim != 2 || p.block.size(0) != tokens || p.block.size(1) < 1 || p.block.size(1) % gemm::kTile != 0) {
    at.fail_at("block", "must be (tokens, a multiple of " + std::to_string(gemm::kTile) + "), got " + p.block.shape());
  }
  at.contiguous(p.block, "block");
  if (p.grad_input.defined() && p.block.size(1) < p.linear_weight.size(0)) {
    ops::check_statistic(at, p.sums, "sums", {tokens, p.input.size(1)});
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
    hopper ? logits_gradient_sm90a(p, first, count, stream) : logits_gradient_sm80(p, first, count, stream);
    multiply_block(p, first, count, stream);
  }
}

}  // namespace llmengine::cuda
