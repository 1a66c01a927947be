// Layer norm and RMS norm of rows, forward and backward (formulas: ops/norm.h).
//
//   A row belongs to W warps of one block. Thread t of them owns the 16-byte vectors t, t + 32 W, t + 64 W, ... of it,
//   so that a warp's loads are 512 bytes side by side. Narrow rows (W = 1) go four to a block; wider ones have a block
//   each.
//
//   forward    held: the row stays in registers as floats, at most 16 a thread (16384 columns at W = 32): one read of
//              input and residual, the variance centred without a second one. Wider rows are read again, from the
//              second-level cache, for the variance (rms: not) and for the output. Two barriers a row (rms: one).
//              moves 2e bytes an element, 4e with a residual (e: bytes of an element)
//   backward   persistent: as many blocks as fill the device, each taking every n-th row, so that a thread keeps its
//              columns' sums for grad_weight and grad_bias in registers from row to row (at most 8 + 8, beside
//              8 + 8 of the row). A block ends by writing its sums as one row of `partial`, and a second kernel
//              adds those rows. No atomics: equal shapes and devices give equal bits.
//              Rows beyond 4096 columns go two at a time, read twice (the second time from the second-level cache),
//              and the sums lie in `partial` itself.
//              moves 3e bytes an element (4e with a residual's gradient), and 8 bytes x blocks x columns
//   limit      memory bandwidth: about 10 flops an element, 25 with dropout's generator
#include <algorithm>
#include <cstdint>

#include "cuda/dispatch.h"
#include "cuda/dropout.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm.h"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

// Forward: 16 floats of a row leave a thread within the 64 registers that 1024 of them may have.
constexpr int kForwardWarps = 32, kForwardFloats = 16;
// Backward: 8 of h, and as many of g, grad_weight and grad_bias, within 128 registers of 512 threads.
constexpr int kBackwardWarps = 16, kBackwardFloats = 8;
constexpr int kWideRows = 2;  // that the wide backward takes at once

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  Rows<const T> input, residual;
  Rows<T> output, new_residual;
  Line weight, bias;
  Dropout dropout;
  float *mean, *rstd;
  int64_t rows;
  int columns;
  float eps;
  bool subtract_mean;
};

// h = residual + dropout(input) of one vector, rounded where it is stored: what the next layer sees is normalised.
template <class T>
__device__ __forceinline__ void make_h(const Forward<T>& p, uint64_t seed, int64_t row, int column, const uint4& input,
                                       const uint4& residual, float (&h)[kLanes<T>]) {
  unpack<T>(input, h);
  if (p.dropout.seed) drop(p.dropout, seed, row, column, h);
  if (!p.residual.data) return;
  float carried[kLanes<T>];
  unpack<T>(residual, carried);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) h[i] += carried[i];
  const uint4 rounded = pack<T>(h);
  store_vector(p.new_residual[row], column, p.columns, p.new_residual.aligned, rounded);
  unpack<T>(rounded, h);
}

template <int n>
__device__ __forceinline__ float sum_of(const float (&x)[n]) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < n; ++i) total += x[i];
  return total;
}

// Sum of (h - mean)^2 over the `valid` first elements of a vector.
template <int n>
__device__ __forceinline__ float squares_of(const float (&h)[n], float mean, int valid) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float d = i < valid ? h[i] - mean : 0.0f;
    total += d * d;
  }
  return total;
}

template <class T>
__device__ __forceinline__ void store_output(const Forward<T>& p, int64_t row, int column, const float (&h)[kLanes<T>],
                                             float mean, float rstd) {
  constexpr int n = kLanes<T>;
  float w[n], b[n], y[n];
  load_line<T>(p.weight, column, p.columns, 1.0f, w);
  load_line<T>(p.bias, column, p.columns, 0.0f, b);
#pragma unroll
  for (int i = 0; i < n; ++i) y[i] = (h[i] - mean) * rstd * w[i] + b[i];
  store_vector(p.output[row], column, p.columns, p.output.aligned, pack<T>(y));
}

template <class T>
__device__ __forceinline__ void store_statistics(const Forward<T>& p, int64_t row, float mean, float rstd) {
  if (threadIdx.x != 0) return;
  if (p.subtract_mean) p.mean[row] = mean;
  p.rstd[row] = rstd;
}

// The row in registers, `kVectors` of it in each thread.
template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kForwardWarps) norm_forward_held(const Forward<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<1, kForwardWarps> slots;
  const int threads = static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x) * n;
  const uint64_t seed = p.dropout.seed ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  const auto columns = static_cast<float>(p.columns);
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    uint4 input[kVectors], residual[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = first + k * threads * n;
      input[k] = load_vector(p.input[row], column, p.columns, p.input.aligned);
      residual[k] = make_uint4(0, 0, 0, 0);
      if (p.residual.data) residual[k] = load_vector(p.residual[row], column, p.columns, p.residual.aligned);
    }
    float h[kVectors][n], total[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      make_h(p, seed, row, first + k * threads * n, input[k], residual[k], h[k]);
      total[0] += sum_of(h[k]);
    }
    float mean = 0.0f;
    if (p.subtract_mean) {
      row_reduce<Sum>(total, slots, turn);
      mean = total[0] / columns;
    }
    float squares[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) squares[0] += squares_of(h[k], mean, p.columns - first - k * threads * n);
    row_reduce<Sum>(squares, slots, turn);
    const float rstd = 1.0f / sqrtf(squares[0] / columns + p.eps);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) store_output(p, row, first + k * threads * n, h[k], mean, rstd);
    store_statistics(p, row, mean, rstd);
  }
}

// h of a vector once more: from new_residual, which this thread wrote, or as before.
template <class T>
__device__ __forceinline__ void h_again(const Forward<T>& p, uint64_t seed, int64_t row, int column,
                                        float (&h)[kLanes<T>]) {
  const Rows<const T> from =
      p.residual.data ? Rows<const T>{p.new_residual.data, p.new_residual.stride, p.new_residual.aligned} : p.input;
  unpack<T>(load_vector(from[row], column, p.columns, from.aligned, false), h);
  if (!p.residual.data && p.dropout.seed) drop(p.dropout, seed, row, column, h);
}

// A row of any width, read three times, or twice where its squares need no mean.
template <class T>
__global__ void __launch_bounds__(32 * kForwardWarps) norm_forward_wide(const Forward<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<1, kForwardWarps> slots;
  const int64_t step = static_cast<int64_t>(blockDim.x) * n, first = static_cast<int64_t>(threadIdx.x) * n;
  const uint64_t seed = p.dropout.seed ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  const auto columns = static_cast<float>(p.columns);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float h[n], total[1] = {0.0f}, squares[1] = {0.0f}, mean = 0.0f;
    for (int64_t c = first; c < p.columns; c += step) {
      const int column = static_cast<int>(c);
      const uint4 input = load_vector(p.input[row], column, p.columns, p.input.aligned, false);
      uint4 residual = make_uint4(0, 0, 0, 0);
      if (p.residual.data) residual = load_vector(p.residual[row], column, p.columns, p.residual.aligned);
      make_h(p, seed, row, column, input, residual, h);
      if (p.subtract_mean) {
        total[0] += sum_of(h);
      } else {
        squares[0] += squares_of(h, 0.0f, p.columns - column);
      }
    }
    if (p.subtract_mean) {
      row_reduce<Sum>(total, slots, turn);
      mean = total[0] / columns;
      for (int64_t c = first; c < p.columns; c += step) {
        h_again(p, seed, row, static_cast<int>(c), h);
        squares[0] += squares_of(h, mean, static_cast<int>(p.columns - c));
      }
    }
    row_reduce<Sum>(squares, slots, turn);
    const float rstd = 1.0f / sqrtf(squares[0] / columns + p.eps);
    for (int64_t c = first; c < p.columns; c += step) {
      h_again(p, seed, row, static_cast<int>(c), h);
      store_output(p, row, static_cast<int>(c), h, mean, rstd);
    }
    store_statistics(p, row, mean, rstd);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Rows<const T> grad_output, carried, h;  // carried: grad_new_residual
  Rows<T> grad_input, grad_residual;
  Line weight;
  Dropout dropout;
  const float *mean, *rstd;
  float* partial;  // (blocks, 2, columns)
  bool partial_aligned;
  int64_t rows;
  int columns;
  bool subtract_mean;
};

struct RowStatistics {
  float mean, rstd;
};

template <class T>
__device__ __forceinline__ RowStatistics statistics_of(const Backward<T>& p, int64_t row) {
  return {p.subtract_mean ? p.mean[row] : 0.0f, p.rstd[row]};
}

// x = (h - mean) rstd of a vector
template <class T>
__device__ __forceinline__ void make_x(const uint4& h, RowStatistics row, float (&x)[kLanes<T>]) {
  unpack<T>(h, x);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] = (x[i] - row.mean) * row.rstd;
}

// Takes grad_output in g and makes it grad_output w; adds to sum g, sum g x, grad_weight and grad_bias. g is rounded:
// contracted into an FMA it would not cancel against its own mean (one column).
template <int n>
__device__ __forceinline__ void add_up(const float (&x)[n], float (&g)[n], const float (&w)[n], float& sum_g,
                                       float& sum_gx, float (&grad_weight)[n], float (&grad_bias)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    grad_weight[i] += g[i] * x[i];
    grad_bias[i] += g[i];
    g[i] = __fmul_rn(g[i], w[i]);
    sum_g += g[i];
    sum_gx += g[i] * x[i];
  }
}

// grad_h of one vector, through the residual's gradient and dropout.
template <class T>
__device__ __forceinline__ void store_gradients(const Backward<T>& p, uint64_t seed, int64_t row, int column,
                                                const float (&x)[kLanes<T>], const float (&g)[kLanes<T>], float mean_g,
                                                float mean_gx, float rstd, const uint4& carried) {
  constexpr int n = kLanes<T>;
  float grad[n], more[n];
  unpack<T>(carried, more);
#pragma unroll
  for (int i = 0; i < n; ++i) grad[i] = (g[i] - mean_g - x[i] * mean_gx) * rstd + more[i];
  if (p.grad_residual.data) {
    store_vector(p.grad_residual[row], column, p.columns, p.grad_residual.aligned, pack<T>(grad));
  }
  if (p.dropout.seed) drop(p.dropout, seed, row, column, grad);
  store_vector(p.grad_input[row], column, p.columns, p.grad_input.aligned, pack<T>(grad));
}

// x and g of a row in registers, `kVectors` of each in a thread.
template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kBackwardWarps) norm_backward_held(const Backward<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<2, kBackwardWarps> slots;
  __shared__ float others[kNarrowRows - 1][2][kVectors * n][32];  // sums of a narrow block's other warps
  const int threads = static_cast<int>(blockDim.x), group = static_cast<int>(threadIdx.y);
  const int first = static_cast<int>(threadIdx.x) * n;
  const uint64_t seed = p.dropout.seed ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  const auto columns = static_cast<float>(p.columns);
  float grad_weight[kVectors][n] = {}, grad_bias[kVectors][n] = {};
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + group; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const RowStatistics statistics = statistics_of(p, row);
    uint4 h[kVectors], carried[kVectors];
    float x[n], w[n], g[kVectors][n], sums[2] = {0.0f, 0.0f};  // of g and g x
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = first + k * threads * n;
      h[k] = load_vector(p.h[row], column, p.columns, p.h.aligned);
      unpack<T>(load_vector(p.grad_output[row], column, p.columns, p.grad_output.aligned), g[k]);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = first + k * threads * n;
      load_line<T>(p.weight, column, p.columns, 1.0f, w);
      make_x<T>(h[k], statistics, x);
      add_up(x, g[k], w, sums[0], sums[1], grad_weight[k], grad_bias[k]);
      carried[k] = make_uint4(0, 0, 0, 0);  // comes while the sums are made
      if (p.carried.data) carried[k] = load_vector(p.carried[row], column, p.columns, p.carried.aligned);
    }
    row_reduce<Sum>(sums, slots, turn);
    const float mean_g = p.subtract_mean ? sums[0] / columns : 0.0f, mean_gx = sums[1] / columns;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      make_x<T>(h[k], statistics, x);
      store_gradients(p, seed, row, first + k * threads * n, x, g[k], mean_g, mean_gx, statistics.rstd, carried[k]);
    }
  }
  if (!p.partial) return;
  if (blockDim.y > 1) {  // one warp a row: lane and thread are the same
    const int lane = static_cast<int>(threadIdx.x);
    if (group > 0) {
#pragma unroll
      for (int j = 0; j < kVectors * n; ++j) {
        others[group - 1][0][j][lane] = grad_weight[j / n][j % n];
        others[group - 1][1][j][lane] = grad_bias[j / n][j % n];
      }
    }
    __syncthreads();
    if (group > 0) return;
    for (int other = 0; other < kNarrowRows - 1; ++other) {
#pragma unroll
      for (int j = 0; j < kVectors * n; ++j) {
        grad_weight[j / n][j % n] += others[other][0][j][lane];
        grad_bias[j / n][j % n] += others[other][1][j][lane];
      }
    }
  }
  float* line = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * p.columns;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int column = first + k * threads * n;
    store_floats(line, column, p.columns, p.partial_aligned, grad_weight[k]);
    store_floats(line + p.columns, column, p.columns, p.partial_aligned, grad_bias[k]);
  }
}

// Rows of any width, kWideRows at a time, so that the sums in `partial` are read and written once for all of them.
template <class T>
__global__ void __launch_bounds__(32 * kBackwardWarps) norm_backward_wide(const Backward<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<2 * kWideRows, kBackwardWarps> slots;
  const int64_t step = static_cast<int64_t>(blockDim.x) * n, first = static_cast<int64_t>(threadIdx.x) * n;
  const uint64_t seed = p.dropout.seed ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  const auto columns = static_cast<float>(p.columns);
  float* line = p.partial ? p.partial + static_cast<int64_t>(blockIdx.x) * 2 * p.columns : nullptr;
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWideRows; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * kWideRows) {
    const int count = p.rows - row < kWideRows ? static_cast<int>(p.rows - row) : kWideRows;
    float x[n], g[n], w[n], sums[2 * kWideRows] = {};
    const auto load_x_g = [&](int r, int column, RowStatistics statistics) {
      make_x<T>(load_vector(p.h[row + r], column, p.columns, p.h.aligned, false), statistics, x);
      unpack<T>(load_vector(p.grad_output[row + r], column, p.columns, p.grad_output.aligned, false), g);
    };
    for (int64_t c = first; c < p.columns; c += step) {
      const int column = static_cast<int>(c);
      load_line<T>(p.weight, column, p.columns, 1.0f, w);
#pragma unroll
      for (int r = 0; r < kWideRows; ++r) {
        if (r >= count) continue;
        float unused[n] = {};
        load_x_g(r, column, statistics_of(p, row + r));
        add_up(x, g, w, sums[2 * r], sums[2 * r + 1], unused, unused);
      }
    }
    row_reduce<Sum>(sums, slots, turn);
    for (int64_t c = first; c < p.columns; c += step) {
      const int column = static_cast<int>(c);
      load_line<T>(p.weight, column, p.columns, 1.0f, w);
      float grad_weight[n] = {}, grad_bias[n] = {};
      if (line && row != static_cast<int64_t>(blockIdx.x) * kWideRows) {
        load_floats(line, column, p.columns, p.partial_aligned, grad_weight);
        load_floats(line + p.columns, column, p.columns, p.partial_aligned, grad_bias);
      }
#pragma unroll
      for (int r = 0; r < kWideRows; ++r) {
        if (r >= count) continue;
        float unused = 0.0f;
        const RowStatistics statistics = statistics_of(p, row + r);
        load_x_g(r, column, statistics);
        add_up(x, g, w, unused, unused, grad_weight, grad_bias);
        uint4 carried = make_uint4(0, 0, 0, 0);
        if (p.carried.data) carried = load_vector(p.carried[row + r], column, p.columns, p.carried.aligned);
        const float mean_g = p.subtract_mean ? sums[2 * r] / columns : 0.0f;
        store_gradients(p, seed, row + r, column, x, g, mean_g, sums[2 * r + 1] / columns, statistics.rstd, carried);
      }
      if (!line) continue;
      store_floats(line, column, p.columns, p.partial_aligned, grad_weight);
      store_floats(line + p.columns, column, p.columns, p.partial_aligned, grad_bias);
    }
  }
}

// ---- the sum of the blocks' shares ----------------------------------------------------------------------------------

constexpr int kSumColumns = 32, kSumLanes = 32;  // a block adds 32 columns: 8 threads of 4 each, times 32 row lanes

// blockIdx.y 0 adds grad_weight, 1 grad_bias. A thread adds every 32nd row of `partial`, then one warp the 32 sums of
// each column.
__global__ void __launch_bounds__(kSumColumns / 4 * kSumLanes)
    norm_backward_sum(const float* partial, bool aligned, int64_t blocks, int columns, float* grad_weight,
                      float* grad_bias) {
  __shared__ float sums[kSumLanes][kSumColumns + 1];  // one column more, so that a warp's reads hit all banks
  float* out = blockIdx.y == 0 ? grad_weight : grad_bias;
  if (!out) return;
  const int x = static_cast<int>(threadIdx.x) * 4, lane = static_cast<int>(threadIdx.y);
  const int column = static_cast<int>(blockIdx.x) * kSumColumns + x;
  float total[4] = {};
  for (int64_t block = lane; block < blocks; block += kSumLanes) {
    float part[4];
    load_floats(partial + (2 * block + blockIdx.y) * columns, column, columns, aligned, part);
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += part[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[lane][x + i] = total[i];
  __syncthreads();
  const int mine = lane * (kSumColumns / 4) + static_cast<int>(threadIdx.x);
  const int wanted = static_cast<int>(blockIdx.x) * kSumColumns + mine;
  if (mine >= kSumColumns || wanted >= columns) return;
  float all = 0.0f;
  for (int l = 0; l < kSumLanes; ++l) all += sums[l][mine];
  out[wanted] = all;
}

// ---- launches -------------------------------------------------------------------------------------------------------

RowShape forward_shape(int columns, int lanes) { return shape_of(columns, lanes, kForwardFloats, kForwardWarps); }
RowShape backward_shape(int columns, int lanes) { return shape_of(columns, lanes, kBackwardFloats, kBackwardWarps); }

template <class T>
void launch_forward(const NormForward& p, cudaStream_t stream) {
  const int columns = columns_of("norm", p.input);
  const Forward<T> given{rows_of<const T>(p.input),
                         rows_of<const T>(p.residual),
                         rows_of<T>(p.output),
                         rows_of<T>(p.new_residual),
                         line_of(p.weight),
                         line_of(p.bias),
                         dropout_of(p.dropout_p, p.seed),
                         p.mean.as<float>(),
                         p.rstd.as<float>(),
                         p.input.size(0),
                         columns,
                         static_cast<float>(p.eps),
                         p.subtract_mean};
  const RowShape shape = forward_shape(columns, kLanes<T>);
  const LaunchSite at{"norm_forward", grid_of(given.rows, shape.rows), shape.block(), stream, p.input};
  if (shape.vectors == 0) return launch(at, norm_forward_wide<T>, given);
  if constexpr (sizeof(T) == 4) {
    visit_at_least<1, 2, 3, 4>(shape.vectors, [&](auto v) { launch(at, norm_forward_held<T, v>, given); });
  } else {
    visit_at_least<1, 2>(shape.vectors, [&](auto v) { launch(at, norm_forward_held<T, v>, given); });
  }
}

template <class T>
void launch_backward(const NormBackward& p, cudaStream_t stream) {
  const int columns = columns_of("norm backward", p.h);
  const int64_t rows = p.h.size(0), blocks = p.partial.size(0);
  const Backward<T> given{rows_of<const T>(p.grad_output),
                          rows_of<const T>(p.grad_new_residual),
                          rows_of<const T>(p.h),
                          rows_of<T>(p.grad_input),
                          rows_of<T>(p.grad_residual),
                          line_of(p.weight),
                          dropout_of(p.dropout_p, p.seed),
                          p.mean.as<float>(),
                          p.rstd.as<float>(),
                          p.partial.as<float>(),
                          has_aligned_rows(p.partial) && columns % 4 == 0,
                          rows,
                          columns,
                          p.subtract_mean};
  const RowShape shape = backward_shape(columns, kLanes<T>);
  const LaunchSite at{"norm_backward", static_cast<unsigned>(blocks), shape.block(), stream, p.h};
  if (shape.vectors == 0) {
    launch(at, norm_backward_wide<T>, given);
  } else if constexpr (sizeof(T) == 4) {
    visit_at_least<1, 2>(shape.vectors, [&](auto v) { launch(at, norm_backward_held<T, v>, given); });
  } else {
    visit_at_least<1>(shape.vectors, [&](auto v) { launch(at, norm_backward_held<T, v>, given); });
  }
  const dim3 grid((static_cast<unsigned>(columns) + kSumColumns - 1) / kSumColumns, 2);
  const LaunchSite sum{"norm_backward_sum", grid, dim3(kSumColumns / 4, kSumLanes), stream, p.partial};
  launch(sum, norm_backward_sum, p.partial.as<float>(), given.partial_aligned, blocks, columns,
         p.grad_weight.as<float>(), p.grad_bias.as<float>());
}

void check_parameters(const Checker& at, DType rows, const NamedTensors& parameters) {
  for (auto [t, argument] : parameters) at.dtype(*t, argument, {DType::f32, rows});
}

}  // namespace

// A block without rows would leave its share unwritten, so there are never more than rows need.
int64_t norm_backward_blocks(const TensorView& h) {
  const RowShape shape = backward_shape(columns_of("norm backward", h), static_cast<int>(16 / size_of(h.dtype)));
  const int rows_at_once = shape.vectors == 0 ? kWideRows : shape.rows;
  const int resident = std::max(1, kBackwardWarps / (shape.warps * shape.rows));
  return std::min<int64_t>(grid_of(h.size(0), rows_at_once), int64_t{resident} * multiprocessors());
}

void validate(const NormForward& p) {
  validate(p, kFloatTypes);
  check_parameters(Checker{p.subtract_mean ? "layer_norm" : "rms_norm"}, p.input.dtype,
                   {{&p.weight, "weight"}, {&p.bias, "bias"}});
}

void validate(const NormBackward& p) {
  validate(p, kFloatTypes);
  const Checker at{p.subtract_mean ? "layer_norm backward" : "rms_norm backward"};
  check_parameters(at, p.h.dtype, {{&p.weight, "weight"}});
  at.defined(p.partial, "partial");
  at.dtype(p.partial, "partial", {DType::f32});
  at.contiguous(p.partial, "partial");
  if (p.partial.ndim != 3) at.fail_at("partial", "must be (blocks, 2, columns), got " + p.partial.shape());
  const int64_t blocks = p.partial.size(0), least = p.h.size(0) > 0, most = norm_backward_blocks(p.h);
  at.shape(p.partial, "partial", {blocks, 2, p.h.size(1)});
  if (blocks < least || blocks > most) {
    at.fail_at("partial", "has " + std::to_string(blocks) + " blocks; allowed: " + std::to_string(least) + " to " +
                              std::to_string(most));
  }
}

void run(const NormForward& p, Stream stream) {
  visit_float(p.input.dtype, [&]<class T>(T) { launch_forward<T>(p, cuda_stream(stream)); });
}

void run(const NormBackward& p, Stream stream) {
  visit_float(p.h.dtype, [&]<class T>(T) { launch_backward<T>(p, cuda_stream(stream)); });
}

}  // namespace llmengine::cuda
