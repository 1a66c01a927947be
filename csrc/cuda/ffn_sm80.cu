// Feed-forward block, forward and backward, with the activation in the epilogues of its products (formulas: ops/ffn.h;
// products: gemm_sm80.cuh).
//
//   forward    hidden_product   x w_up^T (and, of a gated block, x w_gate^T beside it: a tile of 128 tokens has 64
//   hidden
//                               units of each, and a thread both sums of a unit) -> bias, activation, gate, dropout
//              gemm_sm80        hidden w_down^T + b_down
//   backward   hidden_gradient  grad_output w_down -> times dropout, slope, gate: grad_up, grad_gate, hidden once more,
//                               and their sums over 64 tokens each for the biases, which column_sums adds up
//              gemm_sm80        grad_up w_up + grad_gate w_gate in one accumulator; grad_up^T x, grad_gate^T x,
//                               grad_output^T hidden
//
//   flops      4 tokens d f forward, gated 6; twice that backward
//   bytes      beside operands: hidden written and read, the pre-activations written where they are kept; backward the
//              pre-activations read, grad_up, grad_gate and hidden written once and read by two products or one
//   limit      the tensor cores, as of the products alone: with d = 1024 the backward's epilogue moves 96 KiB for 2^25
//              flops a tile, and the multiprocessor's other block multiplies meanwhile
#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/activation.cuh"
#include "cuda/dropout.cuh"
#include "cuda/ffn.h"
#include "cuda/gemm.h"
#include "cuda/gemm_host.h"
#include "cuda/row.cuh"

namespace llmengine::cuda {
namespace {

template <class T>
using Inputs = gemm::Operand<T, false>;

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T, bool gated>
struct Forward {
  Inputs<T> input;
  std::conditional_t<gated, gemm::Pair<T>, Inputs<T>> weight;
  int depth, row_tiles, column_tiles;
  int columns;  // f
  Line b_up, b_gate;
  Rows<T> up, gate, hidden;
  Dropout dropout;
  Activation activation;
};

template <class T, bool gated, int sides>
__device__ __forceinline__ void finish_hidden(const Forward<T, gated>& p, uint64_t seed, int64_t row, int column,
                                              float (&x)[sides][8]) {
  add_line<T>(p.b_up, column, p.columns, x[0]);
  if (p.up.data) store_vector(p.up[row], column, p.columns, p.up.aligned, pack<T>(x[0]));
  if constexpr (gated) {
    add_line<T>(p.b_gate, column, p.columns, x[1]);
    if (p.gate.data) store_vector(p.gate[row], column, p.columns, p.gate.aligned, pack<T>(x[1]));
  }
  visit_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[0][i] = gated ? value_of<activation>(x[sides - 1][i]) * x[0][i] : value_of<activation>(x[0][i]);
    }
  });
  if (p.dropout.seed) drop(p.dropout, seed, row, column, x[0]);
  store_vector(p.hidden[row], column, p.columns, p.hidden.aligned, pack<T>(x[0]));
}

template <class T, bool gated>
__global__ void __launch_bounds__(gemm::kThreads, 2) hidden_product(const Forward<T, gated> p) {
  constexpr int sides = gated ? 2 : 1;
  const gemm::Place tile = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.column_tiles);
  const int row = tile.row * gemm::kTile, column = tile.column * gemm::kTile;
  void* shared = ptx::dynamic_shared();
  gemm::Accumulators c;
  clear(c);
  gemm::multiply_add<T>(c, shared, p.input, p.weight, row, column, p.depth);
  const uint64_t seed = p.dropout.seed ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  gemm::each_vector<sides>(c, shared, [&](int r, int v, float (&x)[sides][8]) {
    if (row + r < p.input.lines) finish_hidden(p, seed, row + r, column / sides + v, x);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Inputs<T> grad_output;
  gemm::Operand<T, true> w_down;
  int depth, row_tiles, column_tiles;
  Rows<const T> up, gate;
  Rows<T> grad_up, grad_gate, hidden;
  Rows<float> partial_up, partial_gate;
  Dropout dropout;
  Activation activation;
};

constexpr int kAhead = 4;  // vectors whose pre-activations a thread asks for at once

struct PreActivations {
  uint4 up, gate;
};

template <class T, bool gated>
__device__ __forceinline__ PreActivations load_pre_activations(const Backward<T>& p, int64_t row, int column) {
  PreActivations x{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (row >= p.grad_output.lines) return x;
  x.up = load_vector(p.up[row], column, p.w_down.lines, p.up.aligned);
  if constexpr (gated) x.gate = load_vector(p.gate[row], column, p.w_down.lines, p.gate.aligned);
  return x;
}

// From the gradient of the hidden layer in `grad` to the gradients of up, there, and of gate.
template <class T, bool gated>
__device__ __forceinline__ void finish_gradients(const Backward<T>& p, uint64_t seed, int64_t row, int column,
                                                 const PreActivations& x, float (&grad)[8], float (&grad_gate)[8]) {
  const int columns = p.w_down.lines;
  float up[8], hidden[8], keep[8];
  unpack<T>(x.up, up);
  unpack<T>(x.gate, grad_gate);
#pragma unroll
  for (int i = 0; i < 8; ++i) keep[i] = 1.0f;
  if (p.dropout.seed) drop(p.dropout, seed, row, column, keep);
  visit_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const ValueAndSlope a = with_slope<activation>(gated ? grad_gate[i] : up[i]);
      const float kept = grad[i] * keep[i];
      hidden[i] = a.value * keep[i] * (gated ? up[i] : 1.0f);
      grad[i] = kept * (gated ? a.value : a.slope);
      grad_gate[i] = kept * up[i] * a.slope;
    }
  });
  store_vector(p.grad_up[row], column, columns, p.grad_up.aligned, pack<T>(grad));
  if constexpr (gated) store_vector(p.grad_gate[row], column, columns, p.grad_gate.aligned, pack<T>(grad_gate));
  if (p.hidden.data) store_vector(p.hidden[row], column, columns, p.hidden.aligned, pack<T>(hidden));
}

template <class T, bool gated>
__global__ void __launch_bounds__(gemm::kThreads, 2) hidden_gradient(const Backward<T> p) {
  const gemm::Place tile = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.column_tiles);
  const int row = tile.row * gemm::kTile, column = tile.column * gemm::kTile;
  void* shared = ptx::dynamic_shared();
  gemm::Accumulators c;
  clear(c);
  gemm::multiply_add<T>(c, shared, p.grad_output, p.w_down, row, column, p.depth);
  const uint64_t seed = p.dropout.seed ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  float sum_up[8] = {}, sum_gate[8] = {};
  const auto load = [&](int r, int v) { return load_pre_activations<T, gated>(p, row + r, column + v); };
  gemm::each_vector<1, kAhead>(c, shared, load, [&](int r, int v, float (&x)[1][8], const PreActivations& saved) {
    if (row + r >= p.grad_output.lines) return;
    float grad_gate[8];
    finish_gradients<T, gated>(p, seed, row + r, column + v, saved, x[0], grad_gate);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum_up[i] += x[0][i];
      if constexpr (gated) sum_gate[i] += grad_gate[i];
    }
  });
  const int64_t line = 2 * static_cast<int64_t>(tile.row) + warp_of() / 2;
  if (p.partial_up.data)
    gemm::store_column_sums(sum_up, p.partial_up[line], column, p.w_down.lines, p.partial_up.aligned);
  if (!gated || !p.partial_gate.data) return;
  gemm::store_column_sums(sum_gate, p.partial_gate[line], column, p.w_down.lines, p.partial_gate.aligned);
}

// ---- launches -------------------------------------------------------------------------------------------------------

Activation activation_of(const std::string& name) { return ops::activation_of(Checker{"ffn"}, name); }

template <class T, bool gated>
void launch_forward(const FeedForwardForward& p, Stream stream) {
  const int row_tiles = gemm::tiles_of(p.input.size(0));
  const int column_tiles = gemm::tiles_of(p.w_up.size(0), gated ? gemm::kTile / 2 : gemm::kTile);
  Forward<T, gated> given{};
  given.input = gemm::operand_of<T, false>(p.input);
  if constexpr (gated) {
    given.weight = {gemm::operand_of<T, false>(p.w_up), gemm::operand_of<T, false>(p.w_gate)};
  } else {
    given.weight = gemm::operand_of<T, false>(p.w_up);
  }
  given.depth = static_cast<int>(p.input.size(1));
  given.row_tiles = row_tiles, given.column_tiles = column_tiles;
  given.columns = static_cast<int>(p.w_up.size(0));
  given.b_up = line_of(p.b_up), given.b_gate = line_of(p.b_gate);
  given.up = rows_of<T>(p.up), given.gate = rows_of<T>(p.gate), given.hidden = rows_of<T>(p.hidden);
  given.dropout = dropout_of(p.dropout_p, p.seed);
  given.activation = activation_of(p.activation);
  launch(gemm::site("hidden_product", gemm::blocks_of("ffn", row_tiles, column_tiles), p.input, stream),
         hidden_product<T, gated>, given);
}

template <class T, bool gated>
void launch_backward(const FeedForwardBackward& p, Stream stream) {
  const int row_tiles = gemm::tiles_of(p.input.size(0)), column_tiles = gemm::tiles_of(p.w_up.size(0));
  Backward<T> given{};
  given.grad_output = gemm::operand_of<T, false>(p.grad_output);
  given.w_down = gemm::operand_of<T, true>(transposed(p.w_down));
  given.depth = static_cast<int>(p.input.size(1));
  given.row_tiles = row_tiles, given.column_tiles = column_tiles;
  given.up = rows_of<const T>(p.up), given.gate = rows_of<const T>(p.gate);
  given.grad_up = rows_of<T>(p.grad_up), given.grad_gate = rows_of<T>(p.grad_gate);
  if (p.grad_w_down.defined()) given.hidden = rows_of<T>(p.hidden);
  if (p.grad_b_up.defined()) given.partial_up = rows_of<float>(p.partial_up);
  if (p.grad_b_gate.defined()) given.partial_gate = rows_of<float>(p.partial_gate);
  given.dropout = dropout_of(p.dropout_p, p.seed);
  given.activation = activation_of(p.activation);
  launch(gemm::site("hidden_gradient", gemm::blocks_of("ffn backward", row_tiles, column_tiles), p.input, stream),
         hidden_gradient<T, gated>, given);
}

void multiply(const TensorView& a, const TensorView& b, const TensorView& out, Stream stream,
              const TensorView& bias = {}) {
  Gemm product{};
  product.a = a, product.b = b, product.bias = bias, product.out = out;
  run(product, stream);
}

bool any_but_b_down(const FeedForwardBackward& p) {
  return p.grad_input.defined() || p.grad_w_up.defined() || p.grad_b_up.defined() || p.grad_w_gate.defined() ||
         p.grad_b_gate.defined() || p.grad_w_down.defined();
}

void check_partial(const Checker& at, const TensorView& grad, const TensorView& partial, const char* argument,
                   int64_t rows, int64_t columns) {
  if (!grad.defined()) return;
  at.defined(partial, argument);
  at.dtype(partial, argument, {DType::f32});
  at.shape(partial, argument, {rows, columns});
  at.contiguous(partial, argument);
}

}  // namespace

void validate(const FeedForwardForward& p) { ops::validate(p, {kProductTypes, true}); }

void validate(const FeedForwardBackward& p) {
  ops::validate(p, {kProductTypes, true});
  const Checker at{"ffn backward"};
  const int64_t parts = 2 * gemm::tiles_of(p.input.size(0));
  check_partial(at, p.grad_b_up, p.partial_up, "partial_up", parts, p.w_up.size(0));
  check_partial(at, p.grad_b_gate, p.partial_gate, "partial_gate", parts, p.w_up.size(0));
  if (p.grad_b_down.defined()) validate(ColumnSums{p.grad_output, p.partial_down, p.grad_b_down});
}

void run(const FeedForwardForward& p, Stream stream) {
  gemm::check_sizes("ffn", {p.input.size(0), p.input.size(1), (p.w_gate.defined() ? 2 : 1) * p.w_up.size(0)});
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    p.w_gate.defined() ? launch_forward<T, true>(p, stream) : launch_forward<T, false>(p, stream);
  });
  multiply(p.hidden, transposed(p.w_down), p.output, stream, p.b_down);
}

void run(const FeedForwardBackward& p, Stream stream) {
  gemm::check_sizes("ffn backward", {p.input.size(0), p.input.size(1), (p.w_gate.defined() ? 2 : 1) * p.w_up.size(0)});
  if (any_but_b_down(p)) {
    gemm::visit_type(p.input.dtype, [&]<class T>(T) {
      p.w_gate.defined() ? launch_backward<T, true>(p, stream) : launch_backward<T, false>(p, stream);
    });
  }
  if (p.grad_input.defined()) {
    Gemm product{};
    product.a = p.grad_up, product.b = p.w_up, product.out = p.grad_input;
    if (p.w_gate.defined()) product.a2 = p.grad_gate, product.b2 = p.w_gate;
    run(product, stream);
  }
  if (p.grad_w_up.defined()) multiply(transposed(p.grad_up), p.input, p.grad_w_up, stream);
  if (p.grad_w_gate.defined()) multiply(transposed(p.grad_gate), p.input, p.grad_w_gate, stream);
  if (p.grad_w_down.defined()) multiply(transposed(p.grad_output), p.hidden, p.grad_w_down, stream);
  if (p.grad_b_up.defined()) run(ColumnSums{p.partial_up, {}, p.grad_b_up}, stream);
  if (p.grad_b_gate.defined()) run(ColumnSums{p.partial_gate, {}, p.grad_b_gate}, stream);
  if (p.grad_b_down.defined()) run(ColumnSums{p.grad_output, p.partial_down, p.grad_b_down}, stream);
}

}  // namespace llmengine::cuda
