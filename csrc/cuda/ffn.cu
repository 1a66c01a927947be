// Activation, gate and dropout of the feed-forward block, forward and backward (formulas: ops/ffn.h).
//
//   A block owns lines of 32 vectors of 16 bytes: a warp has a line of one row, or of two rows 8 apart, and each thread
//   its vector there; all loads are on their way before the first is used. Nothing is shared or waited for.
//
//   forward    hidden = act(up) keep, or act(gate) up keep; two rows a thread.
//              moves 2e bytes an element (e: bytes of an element), gated 3e
//   backward   value and slope of the activation at once; the hidden layer is formed again for w_down's gradient. The
//              gradients of the pre-activations may take the place of the hidden layer's. One row a thread.
//              moves 4e bytes an element, gated 6e (e less without the hidden layer)
//   limit      memory bandwidth: 10 (silu) to 30 (gelu) operations an element, 25 more with dropout's generator
#include <cmath>
#include <cstdint>

#include "cuda/activation.cuh"
#include "cuda/dispatch.h"
#include "cuda/dropout.cuh"
#include "cuda/ffn.h"
#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

using ops::Activation;

constexpr int kLines = 8;        // warps of a block
constexpr int kForwardRows = 2;  // of a thread
// On a multiprocessor, at least: 64 and 80 registers a thread.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  Rows<const T> up, gate;
  Rows<T> hidden;
  Dropout dropout;
  int64_t rows;
  int columns;
};

template <class T, Activation activation>
__global__ void __launch_bounds__(32 * kLines, kForwardBlocks) hidden_forward(const Forward<T> p) {
  constexpr int n = kLanes<T>;
  const int column = static_cast<int>(blockIdx.y * 32 + threadIdx.x) * n;
  const uint64_t seed = p.dropout.seed ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kLines * kForwardRows + threadIdx.y; first < p.rows;
       first += static_cast<int64_t>(gridDim.x) * kLines * kForwardRows) {
    uint4 up[kForwardRows], gate[kForwardRows];
#pragma unroll
    for (int k = 0; k < kForwardRows; ++k) {
      const int64_t row = first + k * kLines;
      if (row >= p.rows) continue;
      up[k] = load_vector(p.up[row], column, p.columns, p.up.aligned);
      if (p.gate.data) gate[k] = load_vector(p.gate[row], column, p.columns, p.gate.aligned);
    }
#pragma unroll
    for (int k = 0; k < kForwardRows; ++k) {
      const int64_t row = first + k * kLines;
      if (row >= p.rows) continue;
      float u[n], h[n];
      unpack<T>(up[k], u);
      if (p.gate.data) {
        unpack<T>(gate[k], h);
#pragma unroll
        for (int i = 0; i < n; ++i) h[i] = value_of<activation>(h[i]) * u[i];
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i) h[i] = value_of<activation>(u[i]);
      }
      if (p.dropout.seed) drop(p.dropout, seed, row, column, h);
      store_vector(p.hidden[row], column, p.columns, p.hidden.aligned, pack<T>(h));
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Rows<const T> grad_hidden, up, gate;
  Rows<T> grad_up, grad_gate, hidden;
  Dropout dropout;
  int64_t rows;
  int columns;
};

// One vector: `keep` and the gradient of the hidden layer come in, the three results go out.
template <class T, Activation activation>
__device__ __forceinline__ void store_gradients(const Backward<T>& p, int64_t row, int column, uint64_t seed,
                                                const uint4& grad_hidden, const uint4& up, const uint4& gate) {
  constexpr int n = kLanes<T>;
  float g[n], u[n], h[n], keep[n];
  unpack<T>(grad_hidden, g);
  unpack<T>(up, u);
#pragma unroll
  for (int i = 0; i < n; ++i) keep[i] = 1.0f;
  if (p.dropout.seed) drop(p.dropout, seed, row, column, keep);
  if (p.gate.data) {
    float v[n];
    unpack<T>(gate, v);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const ValueAndSlope a = with_slope<activation>(v[i]);
      const float kept = g[i] * keep[i];
      h[i] = a.value * u[i] * keep[i];
      v[i] = kept * u[i] * a.slope;
      g[i] = kept * a.value;
    }
    store_vector(p.grad_gate[row], column, p.columns, p.grad_gate.aligned, pack<T>(v));
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const ValueAndSlope a = with_slope<activation>(u[i]);
      h[i] = a.value * keep[i];
      g[i] *= keep[i] * a.slope;
    }
  }
  store_vector(p.grad_up[row], column, p.columns, p.grad_up.aligned, pack<T>(g));
  if (p.hidden.data) store_vector(p.hidden[row], column, p.columns, p.hidden.aligned, pack<T>(h));
}

template <class T, Activation activation>
__global__ void __launch_bounds__(32 * kLines, kBackwardBlocks) hidden_backward(const Backward<T> p) {
  const int column = static_cast<int>(blockIdx.y * 32 + threadIdx.x) * kLanes<T>;
  const uint64_t seed = p.dropout.seed ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kLines + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * kLines) {
    const uint4 grad_hidden = load_vector(p.grad_hidden[row], column, p.columns, p.grad_hidden.aligned);
    const uint4 up = load_vector(p.up[row], column, p.columns, p.up.aligned);
    uint4 gate = make_uint4(0, 0, 0, 0);
    if (p.gate.data) gate = load_vector(p.gate[row], column, p.columns, p.gate.aligned);
    store_gradients<T, activation>(p, row, column, seed, grad_hidden, up, gate);
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

Activation activation_of(const std::string& name) { return ops::activation_of(Checker{"ffn"}, name); }

LaunchSite site(const char* kernel, const TensorView& up, int columns, int rows_of_thread, Stream stream) {
  const int64_t vectors = columns / (16 / size_of(up.dtype)) + 1, blocks = (vectors + 31) / 32;
  check(blocks <= 65535, "ffn: hidden layers of " + std::to_string(columns) + " units are not supported on CUDA");
  const dim3 grid(grid_of(up.size(0), kLines * rows_of_thread), static_cast<unsigned>(blocks));
  return {kernel, columns ? grid : dim3(0), dim3(32, kLines), cuda_stream(stream), up};
}

void check_hidden(const Checker& at, const TensorView& up, const NamedTensors& others, const TensorView& seed,
                  const std::string& activation, double dropout_p) {
  at.defined(up, "up");
  at.dtype(up, "up", kFloatTypes);
  if (up.ndim != 2) at.fail_at("up", "must be (tokens, f), got " + up.shape());
  at.unit_last_stride(up, "up");
  for (auto [t, argument] : others) {
    at.dtype(*t, argument, {up.dtype});
    at.shape(*t, argument, {up.size(0), up.size(1)});
    at.unit_last_stride(*t, argument);
  }
  ops::activation_of(at, activation);
  at.probability(dropout_p, "dropout_p");
  if (dropout_p == 0) return;
  at.defined(seed, "seed");
  at.dtype(seed, "seed", {DType::i64});
  at.shape(seed, "seed", {1});
}

}  // namespace

void validate(const HiddenForward& p) {
  const Checker at{"ffn"};
  at.defined(p.hidden, "hidden");
  check_hidden(at, p.up, {{&p.gate, "gate"}, {&p.hidden, "hidden"}}, p.seed, p.activation, p.dropout_p);
}

void validate(const HiddenBackward& p) {
  const Checker at{"ffn backward"};
  at.defined(p.grad_hidden, "grad_hidden");
  at.defined(p.grad_up, "grad_up");
  if (p.gate.defined() != p.grad_gate.defined()) at.fail_at("grad_gate", "is wanted with gate, and only with it");
  check_hidden(at, p.up,
               {{&p.grad_hidden, "grad_hidden"},
                {&p.gate, "gate"},
                {&p.grad_up, "grad_up"},
                {&p.grad_gate, "grad_gate"},
                {&p.hidden, "hidden"}},
               p.seed, p.activation, p.dropout_p);
}

void run(const HiddenForward& p, Stream stream) {
  const int columns = columns_of("ffn", p.up);
  const LaunchSite at = site("hidden_forward", p.up, columns, kForwardRows, stream);
  visit_float(p.up.dtype, [&]<class T>(T) {
    const Forward<T> given{rows_of<const T>(p.up), rows_of<const T>(p.gate),
                           rows_of<T>(p.hidden),   dropout_of(p.dropout_p, p.seed),
                           p.up.size(0),           columns};
    visit_activation(activation_of(p.activation),
                     [&](auto activation) { launch(at, hidden_forward<T, activation>, given); });
  });
}

void run(const HiddenBackward& p, Stream stream) {
  const int columns = columns_of("ffn backward", p.up);
  const LaunchSite at = site("hidden_backward", p.up, columns, 1, stream);
  visit_float(p.up.dtype, [&]<class T>(T) {
    const Backward<T> given{rows_of<const T>(p.grad_hidden),
                            rows_of<const T>(p.up),
                            rows_of<const T>(p.gate),
                            rows_of<T>(p.grad_up),
                            rows_of<T>(p.grad_gate),
                            rows_of<T>(p.hidden),
                            dropout_of(p.dropout_p, p.seed),
                            p.up.size(0),
                            columns};
    visit_activation(activation_of(p.activation),
                     [&](auto activation) { launch(at, hidden_backward<T, activation>, given); });
  });
}

}  // namespace llmengine::cuda
