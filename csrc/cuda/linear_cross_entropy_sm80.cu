// The products of a linear layer's cross-entropy, on every GPU from sm_80 on (the operator: linear_cross_entropy.cu;
// products: gemm_sm80.cuh).
//
//   logits_of_span   a block owns 128 tokens and a span of the classes, one tile of 128 after the other. What it knows
//                    of each token, of each half of a tile's columns by itself, is in registers of one of the four
//                    threads that have the row. The thread that meets a token's own class writes its logit.
//   logits_gradient  a tile of logits again, and in the epilogue from lse their gradient. What it wants of the tokens
//                    waits in registers until the stages' memory is free for it.
//
//   Tiles of tokens without a label multiply nothing.
//
//   shared  48 KiB of stages and the labels, 512 bytes: with the 1 KiB that each block takes besides, two blocks fit in
//           the 100 KiB of sm_86 and sm_89
//   limit   the tensor cores; an exponential a logit takes 1024 clocks a tile, against 16 d for its products
#include <cmath>
#include <cstdint>

#include "cuda/gemm.h"
#include "cuda/gemm_host.h"
#include "cuda/linear_cross_entropy_products.cuh"

namespace llmengine::cuda {
namespace {

template <class T>
using Inputs = gemm::Operand<T, false>;

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

using Labels = int[gemm::kTile];  // behind the stages in shared memory

// What a thread knows of rows 16 q + lane / 4 and 8 below of its warp's 64, where it is thread q of those that have the
// row, from the warp's columns.
struct Known {
  float largest[2], total[2], weighted[2];
};
static_assert(gemm::kWarpTile == 4 * 16);

// The same of all tokens by the two warps that have columns of their logits, at the end, where the stages were.
struct Halves {
  float largest[2][gemm::kTile], total[2][gemm::kTile], weighted[2][gemm::kTile];
};

__device__ __forceinline__ int side_of_warp() { return gemm::warp_column() / gemm::kWarpTile; }

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
          z = logit_of(p.options, z, bias, inside);
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

// One row of a warp's logits joins what is known of it; `first`: the class of the warp's first column.
template <class T, int m, int half>
__device__ __forceinline__ void add_row(const Forward<T>& p, const gemm::Accumulators& c, const Labels& labels,
                                        Known& known, int row, int first) {
  const int line = gemm::warp_row() + 16 * m + 8 * half + lane_of() / 4, token = row + line;
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
  const int place = labels[line] - first - lane_of() % 4 * 2;
  if (labels[line] >= 0 && place >= 0 && place < gemm::kWarpTile) {
#pragma unroll
    for (int j = 0; j < gemm::kWarpTile / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (place == 8 * j + i) p.target_logits[token] = c[m][j][2 * half + i];
      }
  }
  if (lane_of() % 4 != m) return;
  const float before = known.largest[half], higher = fmaxf(before, most);
  known.largest[half] = higher;
  known.total[half] = known.total[half] * exp_below(before, higher) + total * exp_below(most, higher);
  known.weighted[half] += weighted;
}

template <class T, int m = 0>
__device__ __forceinline__ void add_rows(const Forward<T>& p, const gemm::Accumulators& c, const Labels& labels,
                                         Known& known, int row, int first) {
  add_row<T, m, 0>(p, c, labels, known, row, first);
  add_row<T, m, 1>(p, c, labels, known, row, first);
  if constexpr (m + 1 < gemm::kWarpTile / 16) add_rows<T, m + 1>(p, c, labels, known, row, first);
}

template <class T>
__global__ void __launch_bounds__(gemm::kThreads, 2) logits_of_span(const Forward<T> p) {
  const gemm::Place place = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.spans);
  const int row = place.row * gemm::kTile, begin = place.column * p.tiles_of_span * gemm::kTile;
  char* shared = static_cast<char*>(ptx::dynamic_shared());
  Labels& labels = *reinterpret_cast<Labels*>(shared + gemm::kSharedBytes);
  const int line = static_cast<int>(threadIdx.x);
  labels[line] = label_of(p.options, row + line, p.input.lines);
  Known known{{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {0.0f, 0.0f}};
  __syncthreads();  // the labels are there
  // nobody reads what a block without labels would have written
  if (!any_label(labels)) return;
  const int end = p.options.classes - begin < p.tiles_of_span * gemm::kTile ? p.options.classes
                                                                            : begin + p.tiles_of_span * gemm::kTile;
#pragma unroll 1
  for (int column = begin; column < end; column += gemm::kTile) {
    __syncthreads();  // every warp is done with the stages of the tile before
    gemm::Accumulators c;
    clear(c);
    gemm::multiply_add<T>(c, shared, p.input, p.weight, row, column, 0, p.depth);
    finish_logits(p, c, column + gemm::warp_column());
    add_rows(p, c, labels, known, row, column + gemm::warp_column());
  }
  __syncthreads();  // every warp is done with the last stages
  Halves& halves = *reinterpret_cast<Halves*>(shared);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = gemm::warp_row() + 16 * (lane_of() % 4) + 8 * half + lane_of() / 4, side = side_of_warp();
    halves.largest[side][own] = known.largest[half];
    halves.total[side][own] = known.total[half];
    halves.weighted[side][own] = known.weighted[half];
  }
  __syncthreads();  // both warps of a row are through
  if (row + line >= p.input.lines) return;
  const float largest = fmaxf(halves.largest[0][line], halves.largest[1][line]);
  float* to = p.partial + static_cast<int64_t>(place.column) * 3 * p.input.lines + row + line;
  to[0] = largest;
  to[p.input.lines] = halves.total[0][line] * exp_below(halves.largest[0][line], largest) +
                      halves.total[1][line] * exp_below(halves.largest[1][line], largest);
  to[2 * static_cast<int64_t>(p.input.lines)] = halves.weighted[0][line] + halves.weighted[1][line];
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Inputs<T> input, weight;  // of the block's classes
  int depth, row_tiles, column_tiles;
  LogitsGradient<T> to;
};

using TileTokens = Tokens<gemm::kTile>;  // behind the epilogue's panels
static_assert(gemm::kPanelBytes + sizeof(TileTokens) <= gemm::kSharedBytes);

template <class T>
__global__ void __launch_bounds__(gemm::kThreads, 2) logits_gradient(const Backward<T> p) {
  const gemm::Place tile = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.column_tiles);
  const int row = tile.row * gemm::kTile, column = tile.column * gemm::kTile;
  char* shared = static_cast<char*>(ptx::dynamic_shared());
  const int line = static_cast<int>(threadIdx.x);
  Tokens<1> own{};
  begin_token(p.to, own, 0, row + line);
  Labels& labels = *reinterpret_cast<Labels*>(shared + gemm::kSharedBytes);
  labels[line] = own.label[0];
  __syncthreads();  // the labels are there
  gemm::Accumulators c;
  clear(c);
  if (any_label(labels)) gemm::multiply_add<T>(c, shared, p.input, p.weight, row, column, 0, p.depth);
  __syncthreads();  // every warp is done with the stages
  auto& tokens = *reinterpret_cast<TileTokens*>(shared + gemm::kPanelBytes);
  tokens.label[line] = own.label[0], tokens.lse[line] = own.lse[0];
  tokens.probability[line] = own.probability[0], tokens.smoothing[line] = own.smoothing[0];
  tokens.picked[line] = own.picked[0];
  float sums[8] = {};  // each_vector begins with a barrier: the tokens are then there
  gemm::each_vector<1>(c, shared, [&](int r, int v, float (&x)[1][8]) {
    finish_gradient(p.to, tokens, r, row + r, column + v, x[0], sums);
  });
  const Rows<float>& partial = p.to.partial_bias;
  if (!partial.data) return;
  const int64_t sums_line = 2 * static_cast<int64_t>(tile.row) + warp_of() / 2;
  gemm::store_column_sums(sums, partial[sums_line], column, p.to.columns, partial.aligned);
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <class T>
void launch_gradient(const LinearCrossEntropyBackward& p, const LogitsPart& part, Stream stream) {
  Backward<T> given{};
  given.input = gemm::operand_of<T, false>(rows_from(p.input, part.token, part.tokens));
  given.weight = gemm::operand_of<T, false>(rows_from(p.linear_weight, part.first, part.classes));
  given.depth = static_cast<int>(p.input.size(1));
  given.row_tiles = gemm::tiles_of(part.tokens), given.column_tiles = gemm::tiles_of(part.classes);
  given.to = logits_gradient_of<T>(p, part);
  const unsigned blocks = gemm::blocks_of("linear_cross_entropy backward", given.row_tiles, given.column_tiles);
  LaunchSite at = gemm::site("logits_gradient", blocks, p.input, stream);
  at.shared_bytes += sizeof(Labels);
  launch(at, logits_gradient<T>, given);
}

}  // namespace

int logits_of_spans_sm80(const LinearCrossEntropyForward& p, Stream stream) {
  const int64_t tokens = p.input.size(0), classes = p.linear_weight.size(0), spans = p.partial.size(0);
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    Forward<T> given{};
    given.input = gemm::operand_of<T, false>(p.input), given.weight = gemm::operand_of<T, false>(p.linear_weight);
    given.depth = static_cast<int>(p.input.size(1));
    given.row_tiles = gemm::tiles_of(tokens), given.spans = static_cast<int>(spans);
    given.tiles_of_span = static_cast<int>((gemm::tiles_of(classes) + spans - 1) / spans);
    given.bias = line_of(p.linear_bias);
    given.options = options_of(p, p.weight_sum, static_cast<int>(classes));
    given.partial = p.partial.as<float>(), given.target_logits = p.target_logits.as<float>();
    LaunchSite at =
        gemm::site("logits_of_span", gemm::blocks_of("linear_cross_entropy", given.row_tiles, spans), p.input, stream);
    at.shared_bytes += sizeof(Labels);
    launch(at, logits_of_span<T>, given);
  });
  return static_cast<int>(spans);
}

void logits_gradient_sm80(const LinearCrossEntropyBackward& p, const LogitsPart& part, Stream stream) {
  gemm::visit_type(p.input.dtype, [&]<class T>(T) { launch_gradient<T>(p, part, stream); });
}

}  // namespace llmengine::cuda
