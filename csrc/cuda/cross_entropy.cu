// Cross-entropy of rows of logits, forward and backward (formulas: ops/cross_entropy.h).
//
//   A row belongs to W warps of one block (at most 8, so that four blocks share a multiprocessor and one reads while
//   another reduces); narrow rows go four to a block. A row may begin anywhere (row.cuh, RowParts): a head and a tail
//   of single elements, and between them 16-byte vectors, kUnrolled of them in flight in each thread. Nothing of a row
//   is held, so there may be any number of classes.
//
//   forward    online: each thread keeps the largest logit that it met and the sum of exponentials below it, rescaled
//              when a larger one comes (Milakov & Gimelshein 2018), and with label smoothing the sum of weighted
//              logits. Two reductions join the threads. Rows without a label are not read. moves e bytes an element (e:
//              bytes of an element), once; 6 operations an element, one of them of the special function unit: exp(x) is
//              2^(x log2 e) with the hardware's 2^x, 2^-22 off
//   reduction  the losses are added up by one block, in float64 and in a fixed order
//   backward   once the log-sum-exp is known no element needs another: one pass, in place if the caller wishes. The
//              target's share is taken off before the one rounding: (p - 1) of a rounded p would be lost as p nears 1.
//              moves 2e bytes an element
//   limit      memory bandwidth; with a softcap in 16 bits about as much arithmetic (tanh)
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/cross_entropy.h"
#include "cuda/dispatch.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"
#include "cuda/token_loss.cuh"

namespace llmengine::cuda {
namespace {

constexpr int kWarps = 8;      // of a row, at most
constexpr int kBlocks = 4;     // of kWarps on a multiprocessor, at least: 64 registers a thread
constexpr int kFloats = 32;    // of a row in a thread before the row is given more warps
constexpr int kUnrolled = 4;   // vectors that a thread asks for at once
constexpr int kSumWarps = 32;  // of the block that adds up the losses
constexpr float kLowest = std::numeric_limits<float>::lowest();

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  Rows<const T> input;
  LossOptions options;
  float *losses, *lse;
  int64_t rows;
};

// What a thread knows of the logits that it met: the largest, the sum of exp(z - largest), the sum of w z.
template <bool kSmoothed, bool kCapped>
struct Running {
  float largest = kLowest, total = 0.0f, weighted = 0.0f;

  template <int n>
  __device__ __forceinline__ void add(const LossOptions& o, int column, float (&z)[n]) {
    if constexpr (kCapped) {
#pragma unroll
      for (int i = 0; i < n; ++i) z[i] = o.softcap * tanhf(z[i] * o.inverse_softcap);
    }
    const float most = largest_of(z);
    if (most > largest) {
      total *= exp_of(largest - most);
      largest = most;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) total += exp_of(z[i] - largest);
    if constexpr (kSmoothed) {
      float w[n];
      load_weights(o, column, 1.0f, w);
#pragma unroll
      for (int i = 0; i < n; ++i) weighted += w[i] * z[i];
    }
  }
};

template <bool kCapped, class T>
__device__ __forceinline__ float target_logit(const LossOptions& o, const T* x, int64_t label) {
  if (!o.is_class(label)) return NAN;
  const float value = to_float(x[label]);
  return kCapped ? o.softcap * tanhf(value * o.inverse_softcap) : value;
}

template <class T, bool kSmoothed, bool kCapped>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) cross_entropy_forward(const Forward<T> p) {
  constexpr int n = kLanes<T>, kSums = kSmoothed ? 2 : 1;
  __shared__ RowSlots<1, kWarps> maxima;
  __shared__ RowSlots<kSums, kWarps> sums;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int turn_of_maxima = 0, turn_of_sums = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const LossOptions& o = p.options;
    const int64_t label = o.target[row];
    if (label == o.ignore_index) {  // as all threads of the row find
      if (thread == 0) p.losses[row] = p.lse[row] = 0.0f;
      continue;
    }
    const T* x = p.input[row];
    const float of_target = thread == 0 ? target_logit<kCapped>(o, x, label) : 0.0f;
    const RowParts parts = parts_of(x, o.classes);
    Running<kSmoothed, kCapped> running;
    for (int single = thread; single < parts.singles(); single += threads) {
      const int column = parts.column_of(single, o.classes);
      float z[1] = {to_float(x[column])};
      running.add(o, column, z);
    }
    for (int first = thread; first < parts.vectors; first += kUnrolled * threads) {
      uint4 raw[kUnrolled];
#pragma unroll
      for (int k = 0; k < kUnrolled; ++k) {
        const int vector = first + k * threads;
        if (vector < parts.vectors) raw[k] = ptx::load_16_once(x + parts.head + vector * n);
      }
#pragma unroll
      for (int k = 0; k < kUnrolled; ++k) {
        const int vector = first + k * threads;
        if (vector >= parts.vectors) continue;
        float z[n];
        unpack<T>(raw[k], z);
        running.add(o, parts.head + vector * n, z);
      }
    }
    float largest[1] = {running.largest}, sum[kSums];
    row_reduce<Max>(largest, maxima, turn_of_maxima);
    sum[0] = running.total * exp_of(running.largest - largest[0]);
    if constexpr (kSmoothed) sum[1] = running.weighted;
    row_reduce<Sum>(sum, sums, turn_of_sums);
    if (thread != 0) continue;
    const float log_total = logf(sum[0]);
    p.losses[row] = loss_of(o, label, largest[0], log_total, of_target, sum[kSums - 1]);
    p.lse[row] = largest[0] + log_total;
  }
}

// ---- the sum of the losses ------------------------------------------------------------------------------------------

// loss: null where losses are not reduced.
__global__ void __launch_bounds__(32 * kSumWarps)
    cross_entropy_sum(const float* losses, bool aligned, int64_t rows, const LossOptions o, bool mean, float* loss,
                      float* normaliser) {
  __shared__ RowSlots<2, kSumWarps, double> slots;
  double sums[2] = {};  // of losses and of their weights
  int turn = 0;
  const int64_t step = static_cast<int64_t>(blockDim.x) * 4;
  for (int64_t first = static_cast<int64_t>(threadIdx.x) * 4; loss && first < rows; first += step) {
    const int count = rows - first < 4 ? static_cast<int>(rows - first) : 4;
    float x[4];
    load_floats(losses + first, 0, count, aligned, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[0] += static_cast<double>(x[i]);
      if (!mean || i >= count) continue;
      const int64_t label = o.target[first + i];
      if (label != o.ignore_index) sums[1] += static_cast<double>(o.weight_of(label));
    }
  }
  row_reduce<Sum>(sums, slots, turn);
  if (threadIdx.x != 0) return;
  *normaliser = mean ? static_cast<float>(sums[1]) : 1.0f;
  if (!loss) return;
  const double divided = sums[1] == 0.0 ? 0.0 : sums[0] / sums[1];
  *loss = static_cast<float>(mean ? divided : sums[0]);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Rows<const T> input;
  Rows<T> grad_input;
  LossOptions options;
  const float *grad_loss, *lse, *normaliser;
  int64_t grad_loss_stride, rows;
};

template <class T>
__device__ __forceinline__ void store_zeros(T* row, int columns) {
  const RowParts parts = parts_of(row, columns);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int single = thread; single < parts.singles(); single += threads) {
    row[parts.column_of(single, columns)] = narrowed<T>(0.0f);
  }
  for (int vector = thread; vector < parts.vectors; vector += threads) {
    ptx::store_16(row + parts.head + vector * kLanes<T>, make_uint4(0, 0, 0, 0));
  }
}

template <class T, bool kSmoothed, bool kCapped>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) cross_entropy_backward(const Backward<T> p) {
  constexpr int n = kLanes<T>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const LossOptions& o = p.options;
    const int64_t label = o.target[row];
    T* grad = p.grad_input[row];
    if (label == o.ignore_index) {
      store_zeros(grad, o.classes);
      continue;
    }
    const T* x = p.input[row];
    const float lse = p.lse[row];
    const Factors factors = factors_of(o, p.grad_loss[row * p.grad_loss_stride], *p.normaliser, label, lse);
    const RowParts parts = parts_of<const T>(x, grad, o.classes);
    for (int single = thread; single < parts.singles(); single += threads) {
      const int column = parts.column_of(single, o.classes);
      float g[1] = {to_float(x[column])};
      make_gradient<kSmoothed, kCapped>(o, factors, lse, label, column, g);
      grad[column] = narrowed<T>(g[0]);
    }
    for (int first = thread; first < parts.vectors; first += kUnrolled * threads) {
      uint4 raw[kUnrolled];
#pragma unroll
      for (int k = 0; k < kUnrolled; ++k) {
        const int vector = first + k * threads;
        if (vector < parts.vectors) raw[k] = ptx::load_16_once(x + parts.head + vector * n);
      }
#pragma unroll
      for (int k = 0; k < kUnrolled; ++k) {
        const int vector = first + k * threads, column = parts.head + vector * n;
        if (vector >= parts.vectors) continue;
        float g[n];
        unpack<T>(raw[k], g);
        make_gradient<kSmoothed, kCapped>(o, factors, lse, label, column, g);
        ptx::store_16(grad + column, pack<T>(g));
      }
    }
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

LaunchSite site(const char* kernel, const TensorView& logits, int classes, Stream stream) {
  const RowShape shape = shape_of(classes, static_cast<int>(16 / size_of(logits.dtype)), kFloats, kWarps);
  return {kernel, grid_of(logits.size(0), shape.rows), shape.block(), cuda_stream(stream), logits};
}

}  // namespace

void validate(const CrossEntropyForward& p) {
  ops::validate(p, kFloatTypes);
  check_weight_sum(Checker{"cross_entropy"}, p, p.weight_sum);
}

void validate(const CrossEntropyBackward& p) {
  ops::validate(p, kFloatTypes);
  check_weight_sum(Checker{"cross_entropy backward"}, p, p.weight_sum);
}

void add_losses(const ops::CrossEntropyOptions& p, const TensorView& losses, const TensorView& loss, int classes,
                Stream stream) {
  const LaunchSite at{"cross_entropy_sum", dim3(1), dim3(32 * kSumWarps), cuda_stream(stream), losses};
  launch(at, cross_entropy_sum, losses.as<float>(), has_aligned_rows(losses), losses.size(0),
         options_of(p, {}, classes), p.reduction == "mean", p.reduction == "none" ? nullptr : loss.as<float>(),
         p.normaliser.as<float>());
}

void run(const CrossEntropyForward& p, Stream stream) {
  const int classes = columns_of("cross_entropy", p.input);
  const LossOptions options = options_of(p, p.weight_sum, classes);
  const int64_t rows = p.input.size(0);
  visit_float(p.input.dtype, [&]<class T>(T) {
    const Forward<T> given{rows_of<const T>(p.input), options, p.losses.as<float>(), p.lse.as<float>(), rows};
    visit_options(p.label_smoothing > 0, p.softcap > 0, [&](auto smoothed, auto capped) {
      launch(site("cross_entropy_forward", p.input, classes, stream), cross_entropy_forward<T, smoothed, capped>,
             given);
    });
  });
  add_losses(p, p.losses, p.loss, classes, stream);
}

void run(const CrossEntropyBackward& p, Stream stream) {
  const int classes = columns_of("cross_entropy backward", p.input);
  const LossOptions options = options_of(p, p.weight_sum, classes);
  visit_float(p.input.dtype, [&]<class T>(T) {
    const Backward<T> given{rows_of<const T>(p.input),
                            rows_of<T>(p.grad_input),
                            options,
                            p.grad_loss.as<float>(),
                            p.lse.as<float>(),
                            p.normaliser.as<float>(),
                            p.grad_loss.ndim ? p.grad_loss.stride(0) : 0,
                            p.input.size(0)};
    visit_options(p.label_smoothing > 0, p.softcap > 0, [&](auto smoothed, auto capped) {
      launch(site("cross_entropy_backward", p.input, classes, stream), cross_entropy_backward<T, smoothed, capped>,
             given);
    });
  });
}

}  // namespace llmengine::cuda
