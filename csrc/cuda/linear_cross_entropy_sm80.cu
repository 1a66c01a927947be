// Cross-entropy of a linear layer, forward and backward, whose logits end in the registers that they are made in
// (formulas: ops/linear_cross_entropy.h, ops/cross_entropy.h; products: gemm_sm80.cuh; Wijmans et al. 2024).
//
//                  span of classes                A block of the forward owns 128 tokens and a span of the classes, one
//              +-------+-------+-------+---       tile of 128 after the other. The sums of a tile are logits, which
//              join
//       128    |   z   |   z   |   z   |          what the block knows of each token, in shared memory: the largest,
//       the
//      tokens  |       |       |       |          sum of exponentials below it, with label smoothing the sum of w z.
//              +-------+-------+-------+---       The thread that meets a token's own class writes its logit.
//
//   forward    logits_of_span, then  linear_cross_entropy_merge: the spans of a token in order, its loss and lse;
//              cross_entropy_sum (cross_entropy.cu)
//   backward   for as many classes at a time as `block` has room for: logits_gradient forms their logits again and, in
//              the epilogue, from lse their gradient dz (the target's share taken off in float32), with its sums over
//              64 tokens for the bias; then grad_input += dz weight, in float32 between blocks, and grad_linear_weight
//              = dz^T input of these classes, each by gemm_sm80.cu
//
//   Tiles of tokens without a label multiply nothing. No atomics: every sum has its order.
//
//   flops      2 tokens d classes forward, 6 backward
//   bytes      operands as products read them; 12 a token and span; backward 2 written and 4 read a logit, and 8 an
//              element of grad_input for each block but the first and last: with 64 MiB a block, d = 4096 and 8192
//              tokens 0.27 GB beside 0.8 Tflop
//   limit      the tensor cores; an exponential a logit takes 1024 clocks a tile, against 16 d for its products
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "cuda/cross_entropy.h"
#include "cuda/gemm.h"
#include "cuda/gemm_host.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/row_shape.h"
#include "cuda/token_loss.cuh"

namespace llmengine::cuda {
namespace {

template <class T>
using Inputs = gemm::Operand<T, false>;

constexpr int kMergeThreads = 128;

// The labels of a tile's tokens in shared memory: a class, or one of these.
constexpr int kNoClass = -1, kIgnored = -2;

__device__ __forceinline__ int label_of(const LossOptions& o, int token, int tokens) {
  if (token >= tokens) return kIgnored;
  const int64_t label = o.target[token];
  return label == o.ignore_index ? kIgnored : o.is_class(label) ? static_cast<int>(label) : kNoClass;
}

// Whether any token of the tile has a label: the same in every thread.
__device__ __forceinline__ bool any_label(const int (&labels)[gemm::kTile]) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < gemm::kTile / 32; ++i) found = found || labels[32 * i + lane_of()] != kIgnored;
  return __any_sync(kWholeWarp, found);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  Inputs<T> input, weight;
  int depth, row_tiles, spans;
  int tiles_of_span;
  Line bias;
  LossOptions options;
  float *partial, *target_logits;
};

// What is known of the tokens of a tile, beside the stages in shared memory: of each by the two warps that have columns
// of its logits. A warp's part of a row is one thread's.
struct Known {
  int label[gemm::kTile];
  float largest[2][gemm::kTile], total[2][gemm::kTile], weighted[2][gemm::kTile];
};

template <class T>
__device__ __forceinline__ float element_of(const Line& line, int column) {
  if (line.is_float) return static_cast<const float*>(line.data)[column];
  return to_float(static_cast<const T*>(line.data)[column]);
}

// Sums to logits: bias and softcap; -inf past the last class.
template <class T>
__device__ __forceinline__ void finish_logits(const Forward<T>& p, gemm::Accumulators& c, int first) {
  constexpr int kBlocks = gemm::kWarpTile / 16;
#pragma unroll
  for (int j = 0; j < gemm::kWarpTile / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + 8 * j + lane_of() % 4 * 2 + i;
      const bool inside = column < p.options.classes;
      const float bias = p.bias.data && inside ? element_of<T>(p.bias, column) : 0.0f;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& z = c[m][j][2 * half + i];
          z += bias;
          if (p.options.softcap > 0.0f) z = p.options.softcap * tanhf(z * p.options.inverse_softcap);
          if (!inside) z = -INFINITY;
        }
    }
}

// The sum of w z over this thread's columns of a row.
template <int m, int half>
__device__ __forceinline__ float weighted_sum(const LossOptions& o, const gemm::Accumulators& c, int first) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < gemm::kWarpTile / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + 8 * j + lane_of() % 4 * 2 + i;
      if (column < o.classes) sum += c[m][j][2 * half + i] * (o.weight ? o.weight[column] : 1.0f);
    }
  return sum;
}

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// exp(x - largest), where a row without a logit above -inf so far has no exponentials but NaN's, which no maximum sees.
__device__ __forceinline__ float exp_below(float x, float largest) {
  return exp_of(x - (largest == -INFINITY ? 0.0f : largest));
}

// One row of a warp's logits joins what is known of it; `first`: the class of the warp's first column.
template <class T, int m, int half>
__device__ __forceinline__ void add_row(const Forward<T>& p, const gemm::Accumulators& c, Known& known, int row,
                                        int first) {
  const int line = gemm::warp_row() + 16 * m + 8 * half + lane_of() / 4, side = gemm::warp_column() / gemm::kWarpTile;
  const int token = row + line;
  float most = -INFINITY, total = 0.0f, weighted = 0.0f;
#pragma unroll
  for (int j = 0; j < gemm::kWarpTile / 8; ++j) most = fmaxf(most, fmaxf(c[m][j][2 * half], c[m][j][2 * half + 1]));
  most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
  most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
#pragma unroll
  for (int j = 0; j < gemm::kWarpTile / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) total += exp_below(c[m][j][2 * half + i], most);
  total = sum_of_four(total);
  if (p.options.share > 0.0f) weighted = sum_of_four(weighted_sum<m, half>(p.options, c, first));
  if (token >= p.input.lines) return;
  const int place = known.label[line] - first - lane_of() % 4 * 2;
  if (known.label[line] >= 0 && place >= 0 && place < gemm::kWarpTile) {
#pragma unroll
    for (int j = 0; j < gemm::kWarpTile / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (place == 8 * j + i) p.target_logits[token] = c[m][j][2 * half + i];
      }
  }
  if (lane_of() % 4 != 0) return;
  const float before = known.largest[side][line], higher = fmaxf(before, most);
  known.largest[side][line] = higher;
  known.total[side][line] = known.total[side][line] * exp_below(before, higher) + total * exp_below(most, higher);
  known.weighted[side][line] += weighted;
}

template <class T, int m = 0>
__device__ __forceinline__ void add_rows(const Forward<T>& p, const gemm::Accumulators& c, Known& known, int row,
                                         int first) {
  add_row<T, m, 0>(p, c, known, row, first);
  add_row<T, m, 1>(p, c, known, row, first);
  if constexpr (m + 1 < gemm::kWarpTile / 16) add_rows<T, m + 1>(p, c, known, row, first);
}

template <class T>
__global__ void __launch_bounds__(gemm::kThreads, 2) logits_of_span(const Forward<T> p) {
  const gemm::Place place = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.spans);
  const int row = place.row * gemm::kTile, begin = place.column * p.tiles_of_span * gemm::kTile;
  char* shared = static_cast<char*>(ptx::dynamic_shared());
  Known& known = *reinterpret_cast<Known*>(shared + gemm::kSharedBytes);
  const int line = static_cast<int>(threadIdx.x);
  known.label[line] = label_of(p.options, row + line, p.input.lines);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    known.largest[side][line] = -INFINITY;
    known.total[side][line] = known.weighted[side][line] = 0.0f;
  }
  __syncthreads();  // the labels are there
  // nobody reads what a block without labels would have written
  if (!any_label(known.label)) return;
  const int end = p.options.classes - begin < p.tiles_of_span * gemm::kTile ? p.options.classes
                                                                            : begin + p.tiles_of_span * gemm::kTile;
#pragma unroll 1
  for (int column = begin; column < end; column += gemm::kTile) {
    __syncthreads();  // every warp is done with the stages of the tile before
    gemm::Accumulators c;
    clear(c);
    gemm::multiply_add<T>(c, shared, p.input, p.weight, row, column, p.depth);
    finish_logits(p, c, column + gemm::warp_column());
    add_rows(p, c, known, row, column + gemm::warp_column());
  }
  __syncthreads();  // both warps of a row are through
  if (row + line >= p.input.lines) return;
  const float largest = fmaxf(known.largest[0][line], known.largest[1][line]);
  float* to = p.partial + static_cast<int64_t>(place.column) * 3 * p.input.lines + row + line;
  to[0] = largest;
  to[p.input.lines] = known.total[0][line] * exp_below(known.largest[0][line], largest) +
                      known.total[1][line] * exp_below(known.largest[1][line], largest);
  to[2 * static_cast<int64_t>(p.input.lines)] = known.weighted[0][line] + known.weighted[1][line];
}

// ---- the spans of a token -------------------------------------------------------------------------------------------

struct Merge {
  const float *partial, *target_logits;
  LossOptions options;
  int tokens, spans;
  float *losses, *lse;
};

__global__ void __launch_bounds__(kMergeThreads) linear_cross_entropy_merge(const Merge p) {
  const int token = static_cast<int>(blockIdx.x * kMergeThreads + threadIdx.x);
  if (token >= p.tokens) return;
  const int64_t label = p.options.target[token];
  if (label == p.options.ignore_index) {
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
  const float of_target = p.options.is_class(label) ? p.target_logits[token] : NAN, log_total = logf(total);
  p.losses[token] = loss_of(p.options, label, largest, log_total, of_target, weighted);
  p.lse[token] = largest + log_total;
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Inputs<T> input, weight;  // of the block's classes
  int depth, row_tiles, column_tiles;
  int first;  // class of the block
  Line bias;
  LossOptions options;
  const float *grad_loss, *lse, *normaliser;
  int64_t grad_loss_stride;
  Rows<T> grad;  // (tokens, classes of the block)
  Rows<float> partial_bias;
};

// What the epilogue wants of a tile's tokens, beside the stages in shared memory: asked for before the product, so that
// no vector waits for it.
struct Tokens {
  int label[gemm::kTile];
  float lse[gemm::kTile], probability[gemm::kTile], smoothing[gemm::kTile], picked[gemm::kTile];
};

template <class T>
__device__ __forceinline__ void begin_token(const Backward<T>& p, Tokens& tokens, int row) {
  const int line = static_cast<int>(threadIdx.x), token = row + line;
  const int label = label_of(p.options, token, p.input.lines);
  tokens.label[line] = label;
  if (label == kIgnored) return;
  const float lse = p.lse[token], upstream = p.grad_loss[token * p.grad_loss_stride];
  const Factors factors = factors_of(p.options, upstream, *p.normaliser, label, lse);
  tokens.lse[line] = lse;
  tokens.probability[line] = factors.probability;
  tokens.smoothing[line] = factors.smoothing;
  tokens.picked[line] = factors.picked;
}

// Eight logits of a token from class `column` on, still without their bias, into their gradient.
template <class T>
__device__ __forceinline__ void finish_gradient(const Backward<T>& p, const Tokens& tokens, int line, int column,
                                                float (&x)[8]) {
  const LossOptions& o = p.options;
  add_line<T>(p.bias, column, o.classes, x);
  const Factors factors{tokens.probability[line], tokens.smoothing[line], tokens.picked[line]};
  visit_options(o.share > 0.0f, o.softcap > 0.0f, [&](auto smoothed, auto capped) {
    make_gradient<smoothed, capped>(o, factors, tokens.lse[line], tokens.label[line], column, x);
  });
}

template <class T>
__global__ void __launch_bounds__(gemm::kThreads, 2) logits_gradient(const Backward<T> p) {
  const gemm::Place tile = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.column_tiles);
  const int row = tile.row * gemm::kTile, column = tile.column * gemm::kTile;
  char* shared = static_cast<char*>(ptx::dynamic_shared());
  Tokens& tokens = *reinterpret_cast<Tokens*>(shared + gemm::kSharedBytes);
  begin_token(p, tokens, row);
  __syncthreads();  // the tokens are there
  gemm::Accumulators c;
  clear(c);
  if (any_label(tokens.label)) gemm::multiply_add<T>(c, shared, p.input, p.weight, row, column, p.depth);
  float sums[8] = {};
  gemm::each_vector<1>(c, shared, [&](int r, int v, float (&x)[1][8]) {
    if (row + r >= p.input.lines) return;
    if (tokens.label[r] == kIgnored) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[0][i] = 0.0f;
    } else {
      finish_gradient(p, tokens, r, p.first + column + v, x[0]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += x[0][i];
    store_vector(p.grad[row + r], column + v, p.weight.lines, p.grad.aligned, pack<T>(x[0]));
  });
  if (!p.partial_bias.data) return;
  const int64_t line = 2 * static_cast<int64_t>(tile.row) + warp_of() / 2;
  gemm::store_column_sums(sums, p.partial_bias[line], column, p.weight.lines, p.partial_bias.aligned);
}

// ---- launches -------------------------------------------------------------------------------------------------------

constexpr ops::LinearCrossEntropyTypes kTypes = {kProductTypes, true};

// Columns [0, count) of a matrix.
TensorView columns_up_to(TensorView t, int64_t count) {
  t.sizes[1] = count;
  return t;
}

// The gradient of the logits of classes [first, first + count), in p.block.
template <class T>
void launch_gradient(const LinearCrossEntropyBackward& p, int64_t first, int64_t count, Stream stream) {
  Backward<T> given{};
  given.input = gemm::operand_of<T, false>(p.input);
  given.weight = gemm::operand_of<T, false>(rows_from(p.linear_weight, first, count));
  given.depth = static_cast<int>(p.input.size(1));
  given.row_tiles = gemm::tiles_of(p.input.size(0)), given.column_tiles = gemm::tiles_of(count);
  given.first = static_cast<int>(first);
  given.bias = line_of(p.linear_bias);
  given.options = options_of(p, p.weight_sum, static_cast<int>(p.linear_weight.size(0)));
  given.grad_loss = p.grad_loss.as<float>(), given.lse = p.lse.as<float>();
  given.normaliser = p.normaliser.as<float>();
  given.grad_loss_stride = p.grad_loss.ndim ? p.grad_loss.stride(0) : 0;
  given.grad = rows_of<T>(p.block);
  if (p.grad_linear_bias.defined()) given.partial_bias = rows_of<float>(p.partial_bias);
  const unsigned blocks = gemm::blocks_of("linear_cross_entropy backward", given.row_tiles, given.column_tiles);
  LaunchSite at = gemm::site("logits_gradient", blocks, p.input, stream);
  at.shared_bytes += sizeof(Tokens);
  launch(at, logits_gradient<T>, given);
}

// What the block's gradient gives to those of input, weight and bias.
void multiply_block(const LinearCrossEntropyBackward& p, int64_t first, int64_t count, Stream stream) {
  const bool last = first + count == p.linear_weight.size(0);
  const TensorView grad = columns_up_to(p.block, count);
  if (p.grad_input.defined()) {
    Gemm product{};
    product.a = grad, product.b = rows_from(p.linear_weight, first, count);
    if (first > 0) product.added = p.sums;
    product.out = last ? p.grad_input : p.sums;
    run(product, stream);
  }
  if (p.grad_linear_weight.defined()) {
    Gemm product{};
    product.a = transposed(grad), product.b = p.input;
    product.out = rows_from(p.grad_linear_weight, first, count);
    run(product, stream);
  }
  if (!p.grad_linear_bias.defined()) return;
  TensorView sums = p.grad_linear_bias;
  sums.data = sums.as<float>() + first, sums.sizes[0] = count;
  run(ColumnSums{columns_up_to(p.partial_bias, count), {}, sums}, stream);
}

}  // namespace

void validate(const LinearCrossEntropyForward& p) {
  ops::validate(p, kTypes);
  const Checker at{"linear_cross_entropy"};
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

void validate(const LinearCrossEntropyBackward& p) {
  const Checker at{"linear_cross_entropy backward"};
  ops::check_linear_cross_entropy(at, p, kTypes);
  ops::check_grad_loss(at, p.grad_loss, p);
  ops::check_linear_gradients(at, p, {p.grad_input, p.grad_linear_weight, p.grad_linear_bias}, kTypes);
  check_weight_sum(at, p, p.weight_sum);
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

void run(const LinearCrossEntropyForward& p, Stream stream) {
  const int64_t tokens = p.input.size(0), classes = p.linear_weight.size(0), spans = p.partial.size(0);
  gemm::check_sizes("linear_cross_entropy", {tokens, classes, p.input.size(1)});
  const LossOptions options = options_of(p, p.weight_sum, static_cast<int>(classes));
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    Forward<T> given{};
    given.input = gemm::operand_of<T, false>(p.input), given.weight = gemm::operand_of<T, false>(p.linear_weight);
    given.depth = static_cast<int>(p.input.size(1));
    given.row_tiles = gemm::tiles_of(tokens), given.spans = static_cast<int>(spans);
    given.tiles_of_span = static_cast<int>((gemm::tiles_of(classes) + spans - 1) / spans);
    given.bias = line_of(p.linear_bias);
    given.options = options;
    given.partial = p.partial.as<float>(), given.target_logits = p.target_logits.as<float>();
    LaunchSite at =
        gemm::site("logits_of_span", gemm::blocks_of("linear_cross_entropy", given.row_tiles, spans), p.input, stream);
    at.shared_bytes += sizeof(Known);
    launch(at, logits_of_span<T>, given);
  });
  const Merge merge{p.partial.as<float>(),   p.target_logits.as<float>(), options,          static_cast<int>(tokens),
                    static_cast<int>(spans), p.losses.as<float>(),        p.lse.as<float>()};
  const LaunchSite at{"linear_cross_entropy_merge", dim3(grid_of(tokens, kMergeThreads)), dim3(kMergeThreads),
                      cuda_stream(stream), p.input};
  launch(at, linear_cross_entropy_merge, merge);
  add_losses(p, p.losses, p.loss, static_cast<int>(classes), stream);
}

void run(const LinearCrossEntropyBackward& p, Stream stream) {
  const int64_t tokens = p.input.size(0), classes = p.linear_weight.size(0);
  gemm::check_sizes("linear_cross_entropy backward", {tokens, classes, p.input.size(1)});
  for (int64_t first = 0; first < classes; first += p.block.size(1)) {
    const int64_t count = std::min(p.block.size(1), classes - first);
    gemm::visit_type(p.input.dtype, [&]<class T>(T) { launch_gradient<T>(p, first, count, stream); });
    multiply_block(p, first, count, stream);
  }
}

}  // namespace llmengine::cuda
