// Softmax of rows, forward and backward (formulas: ops/softmax.h).
//
//   Rows lie on threads as in norm.cu: W warps to a row, 16-byte vectors in turn, four narrow rows to a block.
//
//   forward    held: at most 16 floats a thread stay in registers (16384 columns at W = 32): the maximum, then
//              exponentials and their sum, then the output: one read. Wider rows: each thread keeps a running maximum
//              and sum, and the row is read again, from the second-level cache, for the output.
//              moves 2e bytes an element (e: bytes of an element)
//   backward   sum of g y, then y (g - sum); held up to 8192 columns, beyond that read again. Moves 3e bytes an element
//   limit      memory bandwidth
#include <cmath>
#include <cstdint>

#include "cuda/dispatch.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"
#include "cuda/softmax.h"

namespace llmengine::cuda {
namespace {

constexpr int kWarps = 32;  // of a row
// That a thread holds of a row, within the 64 registers that 1024 threads may have; the backward holds two rows.
constexpr int kForwardFloats = 16, kBackwardFloats = 8;

template <class T>
struct Forward {
  Rows<const T> input;
  Rows<T> output;
  int64_t rows;
  int columns;
};

template <class T>
struct Backward {
  Rows<const T> grad_output, output;
  Rows<T> grad_input;
  int64_t rows;
  int columns;
};

// ---- forward --------------------------------------------------------------------------------------------------------

// What is subtracted before exponentials: the maximum, or 0 in a row of -inf alone, whose exponentials are all 0.
__device__ __forceinline__ float shift_for(float largest) { return largest == -INFINITY ? 0.0f : largest; }
__device__ __forceinline__ float scale_for(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// -inf for the columns past the end: they neither raise the maximum nor add to the sum.
template <class T>
__device__ __forceinline__ void load_logits(const Forward<T>& p, int64_t row, int column, bool once,
                                            float (&x)[kLanes<T>]) {
  unpack<T>(load_vector(p.input[row], column, p.columns, p.input.aligned, once), x);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] = column + i < p.columns ? x[i] : -INFINITY;
}

// Makes exponentials of the logits and returns their sum.
template <int n>
__device__ __forceinline__ float exponentials(float (&x)[n], float shift) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    x[i] = expf(x[i] - shift);
    total += x[i];
  }
  return total;
}

template <class T>
__device__ __forceinline__ void store_scaled(const Forward<T>& p, int64_t row, int column, float (&x)[kLanes<T>],
                                             float scale) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] *= scale;
  store_vector(p.output[row], column, p.columns, p.output.aligned, pack<T>(x));
}

template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kWarps) softmax_forward_held(const Forward<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<1, kWarps> slots;
  const int first = static_cast<int>(threadIdx.x) * n, step = static_cast<int>(blockDim.x) * n;
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    float x[kVectors][n], largest[1] = {-INFINITY}, total[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) load_logits(p, row, first + k * step, true, x[k]);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) largest[0] = fmaxf(largest[0], largest_of(x[k]));
    row_reduce<Max>(largest, slots, turn);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) total[0] += exponentials(x[k], shift_for(largest[0]));
    row_reduce<Sum>(total, slots, turn);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) store_scaled(p, row, first + k * step, x[k], scale_for(total[0]));
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) softmax_forward_wide(const Forward<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<1, kWarps> slots;
  const int64_t step = static_cast<int64_t>(blockDim.x) * n, first = static_cast<int64_t>(threadIdx.x) * n;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float x[n], largest = -INFINITY, total[1] = {0.0f};
    for (int64_t c = first; c < p.columns; c += step) {
      load_logits(p, row, static_cast<int>(c), false, x);
      const float raised = fmaxf(largest, largest_of(x));
      total[0] *= expf(largest - shift_for(raised));
      total[0] += exponentials(x, shift_for(raised));
      largest = raised;
    }
    float common[1] = {largest};
    row_reduce<Max>(common, slots, turn);
    const float shift = shift_for(common[0]);
    total[0] *= expf(largest - shift);  // 0 where this thread saw -inf alone: its sum is 0 as well
    row_reduce<Sum>(total, slots, turn);
    for (int64_t c = first; c < p.columns; c += step) {
      load_logits(p, row, static_cast<int>(c), false, x);
      exponentials(x, shift);
      store_scaled(p, row, static_cast<int>(c), x, scale_for(total[0]));
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ float sum_of_products(const uint4& grad_output, const uint4& output) {
  float g[kLanes<T>], y[kLanes<T>], total = 0.0f;
  unpack<T>(grad_output, g);
  unpack<T>(output, y);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) total += g[i] * y[i];
  return total;
}

template <class T>
__device__ __forceinline__ void store_gradient(const Backward<T>& p, int64_t row, int column, const uint4& grad_output,
                                               const uint4& output, float total) {
  float g[kLanes<T>], y[kLanes<T>];
  unpack<T>(grad_output, g);
  unpack<T>(output, y);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) g[i] = (g[i] - total) * y[i];
  store_vector(p.grad_input[row], column, p.columns, p.grad_input.aligned, pack<T>(g));
}

template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kWarps) softmax_backward_held(const Backward<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<1, kWarps> slots;
  const int first = static_cast<int>(threadIdx.x) * n, step = static_cast<int>(blockDim.x) * n;
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    uint4 g[kVectors], y[kVectors];
    float total[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      g[k] = load_vector(p.grad_output[row], first + k * step, p.columns, p.grad_output.aligned);
      y[k] = load_vector(p.output[row], first + k * step, p.columns, p.output.aligned);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) total[0] += sum_of_products<T>(g[k], y[k]);
    row_reduce<Sum>(total, slots, turn);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) store_gradient(p, row, first + k * step, g[k], y[k], total[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) softmax_backward_wide(const Backward<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<1, kWarps> slots;
  const int64_t step = static_cast<int64_t>(blockDim.x) * n, first = static_cast<int64_t>(threadIdx.x) * n;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float total[1] = {0.0f};
    uint4 g, y;
    const auto load = [&](int column) {
      g = load_vector(p.grad_output[row], column, p.columns, p.grad_output.aligned, false);
      y = load_vector(p.output[row], column, p.columns, p.output.aligned, false);
    };
    for (int64_t c = first; c < p.columns; c += step) {
      load(static_cast<int>(c));
      total[0] += sum_of_products<T>(g, y);
    }
    row_reduce<Sum>(total, slots, turn);
    for (int64_t c = first; c < p.columns; c += step) {
      load(static_cast<int>(c));
      store_gradient(p, row, static_cast<int>(c), g, y, total[0]);
    }
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

// `held` is called with the vectors of a thread as a constant; `wide` where a row does not fit.
template <class T, int floats, class Held, class Wide>
void with_row_shape(const char* kernel, const TensorView& operand, int columns, Stream stream, const Held& held,
                    const Wide& wide) {
  const RowShape shape = shape_of(columns, kLanes<T>, floats, kWarps);
  const LaunchSite at{kernel, grid_of(operand.size(0), shape.rows), shape.block(), cuda_stream(stream), operand};
  const auto launch_held = [&](auto vectors) { held(at, vectors); };
  constexpr int most = floats / kLanes<T>;
  if (shape.vectors == 0) {
    wide(at);
  } else if constexpr (most == 4) {
    visit_at_least<1, 2, 3, 4>(shape.vectors, launch_held);
  } else if constexpr (most == 2) {
    visit_at_least<1, 2>(shape.vectors, launch_held);
  } else {
    visit_at_least<1>(shape.vectors, launch_held);
  }
}

}  // namespace

void validate(const SoftmaxForward& p) {
  validate(p, kFloatTypes);
  Checker{"softmax"}.dtype(p.output, "output", {p.input.dtype});
}

void validate(const SoftmaxBackward& p) {
  validate(p, kFloatTypes);
  Checker{"softmax backward"}.dtype(p.grad_input, "grad_input", {p.output.dtype});
}

void run(const SoftmaxForward& p, Stream stream) {
  visit_float(p.input.dtype, [&]<class T>(T) {
    const int columns = columns_of("softmax", p.input);
    const Forward<T> given{rows_of<const T>(p.input), rows_of<T>(p.output), p.input.size(0), columns};
    with_row_shape<T, kForwardFloats>(
        "softmax_forward", p.input, columns, stream,
        [&](const LaunchSite& at, auto vectors) { launch(at, softmax_forward_held<T, vectors>, given); },
        [&](const LaunchSite& at) { launch(at, softmax_forward_wide<T>, given); });
  });
}

void run(const SoftmaxBackward& p, Stream stream) {
  visit_float(p.output.dtype, [&]<class T>(T) {
    const int columns = columns_of("softmax backward", p.output);
    const Backward<T> given{rows_of<const T>(p.grad_output), rows_of<const T>(p.output), rows_of<T>(p.grad_input),
                            p.output.size(0), columns};
    with_row_shape<T, kBackwardFloats>(
        "softmax_backward", p.output, columns, stream,
        [&](const LaunchSite& at, auto vectors) { launch(at, softmax_backward_held<T, vectors>, given); },
        [&](const LaunchSite& at) { launch(at, softmax_backward_wide<T>, given); });
  });
}

}  // namespace llmengine::cuda
