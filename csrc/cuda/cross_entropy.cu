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
#include "cuda/maths.cuh"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

constexpr int kWarps = 8;      // of a row, at most
constexpr int kBlocks = 4;     // of kWarps on a multiprocessor, at least: 64 registers a thread
constexpr int kFloats = 32;    // of a row in a thread before the row is given more warps
constexpr int kUnrolled = 4;   // vectors that a thread asks for at once
constexpr int kSumWarps = 32;  // of the block that adds up the losses
constexpr float kLowest = std::numeric_limits<float>::lowest();

// ---- what a row's loss is made of -----------------------------------------------------------------------------------

struct Options {
  const int64_t* target;
  const float *weight, *weight_sum;  // null: every class weighs 1
  bool weight_aligned;
  int classes;
  int64_t ignore_index;
  float kept, share, z_loss;  // 1 - label_smoothing, label_smoothing / classes
  float softcap, inverse_softcap;

  __device__ bool is_class(int64_t label) const { return label >= 0 && label < classes; }
  __device__ float weight_of(int64_t label) const { return weight && is_class(label) ? weight[label] : 1.0f; }
  __device__ float sum_of_weights() const { return weight_sum ? *weight_sum : static_cast<float>(classes); }
};

Options options_of(const ops::CrossEntropyOptions& p, const TensorView& weight_sum, int classes) {
  Options o{};
  o.target = p.target.as<int64_t>();
  o.weight = p.weight.as<float>();
  o.weight_aligned = p.weight.defined() && has_aligned_rows(p.weight);
  if (p.weight.defined() && p.label_smoothing > 0) o.weight_sum = weight_sum.as<float>();
  o.classes = classes;
  o.ignore_index = p.ignore_index;
  o.kept = static_cast<float>(1.0 - p.label_smoothing);
  o.share = p.label_smoothing > 0 ? static_cast<float>(p.label_smoothing / classes) : 0.0f;
  o.z_loss = static_cast<float>(p.z_loss);
  o.softcap = static_cast<float>(p.softcap);
  o.inverse_softcap = p.softcap > 0 ? static_cast<float>(1.0 / p.softcap) : 0.0f;
  return o;
}

// Weights of n classes from `column` on, times `factor`.
template <int n>
__device__ __forceinline__ void load_weights(const Options& o, int column, float factor, float (&w)[n]) {
  if constexpr (n == 1) {
    w[0] = o.weight ? o.weight[column] : 1.0f;
  } else if (o.weight) {
    load_floats(o.weight, column, o.classes, o.weight_aligned && column % 4 == 0, w);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) w[i] = 1.0f;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) w[i] *= factor;
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  Rows<const T> input;
  Options options;
  float *losses, *lse;
  int64_t rows;
};

// What a thread knows of the logits that it met: the largest, the sum of exp(z - largest), the sum of w z.
template <bool kSmoothed, bool kCapped>
struct Running {
  float largest = kLowest, total = 0.0f, weighted = 0.0f;

  template <int n>
  __device__ __forceinline__ void add(const Options& o, int column, float (&z)[n]) {
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
__device__ __forceinline__ float target_logit(const Options& o, const T* x, int64_t label) {
  if (!o.is_class(label)) return NAN;
  const float value = to_float(x[label]);
  return kCapped ? o.softcap * tanhf(value * o.inverse_softcap) : value;
}

// log_total: the logarithm of sum exp(z - largest), so that lse = largest + log_total. Not from lse - z_y: where a row
// is nearly certain, log_total is far smaller than the logits.
__device__ __forceinline__ float loss_of(const Options& o, int64_t label, float largest, float log_total,
                                         float of_target, float weighted) {
  float loss = o.kept * o.weight_of(label) * (log_total + (largest - of_target));
  if (o.share > 0.0f) {
    const float weights = o.sum_of_weights();
    loss += o.share * (weights * log_total + (weights * largest - weighted));
  }
  const float lse = largest + log_total;
  return loss + o.z_loss * lse * lse;
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
    const Options& o = p.options;
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
    cross_entropy_sum(const float* losses, bool aligned, int64_t rows, const Options o, bool mean, float* loss,
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
  Options options;
  const float *grad_loss, *lse, *normaliser;
  int64_t grad_loss_stride, rows;
};

// dloss / dz_c = p_c probability - w_c smoothing - [c = label] picked
struct Factors {
  float probability, smoothing, picked;
};

template <class T>
__device__ __forceinline__ Factors factors_of(const Backward<T>& p, int64_t row, int64_t label, float lse) {
  const Options& o = p.options;
  const float normaliser = *p.normaliser;
  float scale = p.grad_loss[row * p.grad_loss_stride] * (normaliser == 0.0f ? 0.0f : 1.0f / normaliser);
  if (!o.is_class(label)) scale = NAN;
  const float picked = o.kept * o.weight_of(label);
  const float smoothing = o.share > 0.0f ? o.share * o.sum_of_weights() : 0.0f;
  return {scale * (picked + smoothing + 2.0f * o.z_loss * lse), scale * o.share, scale * picked};
}

// Turns n logits from `column` on into their gradient.
template <bool kSmoothed, bool kCapped, int n>
__device__ __forceinline__ void make_gradient(const Options& o, const Factors& factors, float lse, int64_t label,
                                              int column, float (&x)[n]) {
  float tangent[n], smoothing[n];
  if constexpr (kSmoothed) load_weights(o, column, factors.smoothing, smoothing);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (kCapped) {
      tangent[i] = tanhf(x[i] * o.inverse_softcap);
      x[i] = o.softcap * tangent[i];
    }
    x[i] = exp_of(x[i] - lse) * factors.probability;
    if constexpr (kSmoothed) x[i] -= smoothing[i];
  }
  const int64_t place = label - column;
  if (place >= 0 && place < n) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] -= i == place ? factors.picked : 0.0f;
  }
  if constexpr (kCapped) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] *= 1.0f - tangent[i] * tangent[i];
  }
}

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
    const Options& o = p.options;
    const int64_t label = o.target[row];
    T* grad = p.grad_input[row];
    if (label == o.ignore_index) {
      store_zeros(grad, o.classes);
      continue;
    }
    const T* x = p.input[row];
    const float lse = p.lse[row];
    const Factors factors = factors_of(p, row, label, lse);
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

// body(smoothed, capped) with the two as constants.
template <class Body>
void visit_options(const ops::CrossEntropyOptions& p, const Body& body) {
  const auto with_softcap = [&](auto smoothed) {
    if (p.softcap > 0) {
      body(smoothed, std::true_type{});
    } else {
      body(smoothed, std::false_type{});
    }
  };
  if (p.label_smoothing > 0) {
    with_softcap(std::true_type{});
  } else {
    with_softcap(std::false_type{});
  }
}

LaunchSite site(const char* kernel, const TensorView& logits, int classes, Stream stream) {
  const RowShape shape = shape_of(classes, static_cast<int>(16 / size_of(logits.dtype)), kFloats, kWarps);
  return {kernel, grid_of(logits.size(0), shape.rows), shape.block(), cuda_stream(stream), logits};
}

void check_weight_sum(const Checker& at, const ops::CrossEntropyOptions& p, const TensorView& weight_sum) {
  if (p.weight.defined() && p.label_smoothing > 0) ops::check_statistic(at, weight_sum, "weight_sum", {});
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

void run(const CrossEntropyForward& p, Stream stream) {
  const int classes = columns_of("cross_entropy", p.input);
  const Options options = options_of(p, p.weight_sum, classes);
  const int64_t rows = p.input.size(0);
  visit_float(p.input.dtype, [&]<class T>(T) {
    const Forward<T> given{rows_of<const T>(p.input), options, p.losses.as<float>(), p.lse.as<float>(), rows};
    visit_options(p, [&](auto smoothed, auto capped) {
      launch(site("cross_entropy_forward", p.input, classes, stream), cross_entropy_forward<T, smoothed, capped>,
             given);
    });
  });
  const LaunchSite sum{"cross_entropy_sum", dim3(1), dim3(32 * kSumWarps), cuda_stream(stream), p.losses};
  launch(sum, cross_entropy_sum, p.losses.as<float>(), has_aligned_rows(p.losses), rows, options, p.reduction == "mean",
         p.reduction == "none" ? nullptr : p.loss.as<float>(), p.normaliser.as<float>());
}

void run(const CrossEntropyBackward& p, Stream stream) {
  const int classes = columns_of("cross_entropy backward", p.input);
  const Options options = options_of(p, p.weight_sum, classes);
  visit_float(p.input.dtype, [&]<class T>(T) {
    const Backward<T> given{rows_of<const T>(p.input),
                            rows_of<T>(p.grad_input),
                            options,
                            p.grad_loss.as<float>(),
                            p.lse.as<float>(),
                            p.normaliser.as<float>(),
                            p.grad_loss.ndim ? p.grad_loss.stride(0) : 0,
                            p.input.size(0)};
    visit_options(p, [&](auto smoothed, auto capped) {
      launch(site("cross_entropy_backward", p.input, classes, stream), cross_entropy_backward<T, smoothed, capped>,
             given);
    });
  });
}

}  // namespace llmengine::cuda
