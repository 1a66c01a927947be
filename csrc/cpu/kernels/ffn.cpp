// Feed-forward block, forward and backward (formulas: ops/ffn.h), as products whose tiles end in the elementwise part.
//
//   forward    1  x w_up^T (and x w_gate^T in the same tiles)  -> bias, activation, gate, dropout -> hidden,
//   pre-activations
//              2  hidden w_down^T                              -> bias, residual -> output
//   backward   1  grad_output w_down   -> dropout, act' -> grad_up, grad_gate, and the hidden layer once more
//              2  grad_output^T hidden, grad_up^T x, grad_gate^T x, grad_up w_up + grad_gate w_gate
//
//   No elementwise pass goes to memory of its own: a tile (csrc/cpu/gemm.h) is in the second-level cache when its
//   epilogue reads it. Multiply-adds: tokens d f times 2 forward (3 gated), 4 backward (6). Activations and dropout are
//   about 20 to 60 instructions a vector of the hidden layer, against d / 2 for its products. Limit: the multiply-add
//   units; memory beside the products: tokens f elements of the hidden layer, 2 (3 gated) in the backward.
#include "ops/ffn.h"

#include <vector>

#include "cpu/dropout.h"
#include "cpu/gemm.h"
#include "cpu/lines.h"
#include "cpu/vec_math.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

struct Act {
  F value, slope;
};

// 1 / (1 + exp(-x)) and its derivative s (1 - s), in which 1 - s would cancel
inline Act logistic(F x) {
  const F e = exp(from_bits(bits(x) | static_cast<int32_t>(0x80000000)));  // of -|x|
  const F i = 1.0f / (1.0f + e);
  return {select(x < 0.0f, e * i, i), e * i * i};
}

// T: what the results are rounded to.
template <class T>
struct Gelu {
  static Act of(F x) {
    if constexpr (std::is_same_v<T, bf16>) return {x * near_cdf(x), near_gelu_slope(x)};
    const Normal normal_x = normal(x);
    return {x * normal_x.cdf, normal_x.cdf + x * normal_x.density};
  }
};

struct GeluTanh {
  // (1 + tanh u) / 2 = logistic(2 u), accurate where tanh u nears -1 and the sum would cancel
  static Act of(F x) {
    const float c = 1.59576912f, cubic = 0.044715f;                   // 2 sqrt(2 / pi)
    const F near = min(max(x, broadcast(-12.0f)), broadcast(12.0f));  // beyond, both tails are exact; cubes stay finite
    const F square = near * near;
    const Act s = logistic(c * near * (1.0f + cubic * square));
    return {x * s.value, s.value + s.slope * near * c * (1.0f + 3.0f * cubic * square)};
  }
};

struct Relu {
  static Act of(F x) { return {max(x, F{}), select(x > 0.0f, broadcast(1.0f), F{})}; }
};

struct ReluSquared {
  static Act of(F x) {
    const F positive = max(x, F{});
    return {positive * positive, positive + positive};
  }
};

struct Silu {
  static Act of(F x) {
    const Act s = logistic(x);
    return {x * s.value, s.value + x * s.slope};
  }
};

template <class T, class Body>
void visit_activation(const std::string& name, const Body& body) {
  switch (ops::activation_of(Checker{"ffn"}, name)) {
    case ops::Activation::gelu: return body(Gelu<T>{});
    case ops::Activation::gelu_tanh: return body(GeluTanh{});
    case ops::Activation::relu: return body(Relu{});
    case ops::Activation::relu_squared: return body(ReluSquared{});
    case ops::Activation::silu: return body(Silu{});
  }
}

template <class T>
T* at(const TensorView& t, int64_t row, int64_t column) {
  return t.defined() ? t.as<T>() + row * t.stride(0) + column : nullptr;
}

// Dropout multipliers of one row of a tile, or a line of ones.
struct Keep {
  const Dropout& dropout;
  float line[kTileColumns];

  explicit Keep(const Dropout& d) : dropout(d) { std::fill_n(line, kTileColumns, 1.0f); }
  const float* of(const Tile& tile, int64_t r) {
    if (dropout.active) dropout.multipliers(0, tile.row + r, tile.column, tile.columns, line);
    return line;
  }
};

// Accumulators of a tile: 0 holds x w_up^T, 1 x w_gate^T.
template <class T, class Activation>
void write_hidden(const ops::FeedForwardForward& p, const Dropout& dropout, const float* b_up, const float* b_gate,
                  const Tile& tile) {
  Keep keep(dropout);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row + r, column = tile.column;
    const float* up_sums = tile.c[0] + r * tile.stride;
    const float* gate_sums = p.w_gate.defined() ? tile.c[1] + r * tile.stride : nullptr;
    T *up = at<T>(p.up, row, column), *gate = at<T>(p.gate, row, column), *hidden = at<T>(p.hidden, row, column);
    const float* kept = keep.of(tile, r);
    for_lanes(tile.columns, [&](int64_t i, auto n) {
      const F u = load_n(up_sums + i, n) + load_n(b_up + column + i, n);
      if (up) store_n(up + i, u, n);
      F g = u;
      if (gate_sums) {
        g = load_n(gate_sums + i, n) + load_n(b_gate + column + i, n);
        if (gate) store_n(gate + i, g, n);
      }
      if (!hidden) return;
      const F h = Activation::of(g).value;
      store_n(hidden + i, (gate_sums ? h * u : h) * load_n(kept + i, n), n);
    });
  }
}

// A bias's gradient: rows are summed while still in float, each block of kRowBlock in a line of its own, which one tile
// fills; then the lines.
struct BlockSums {
  int64_t columns;
  std::vector<float> lines;  // empty: not wanted

  BlockSums(const TensorView& out, int64_t rows)
      : columns(out.defined() ? out.size(0) : 0), lines((rows + kRowBlock - 1) / kRowBlock * columns) {}
  float* line(int64_t row, int64_t column) {
    return columns ? lines.data() + row / kRowBlock * columns + column : nullptr;
  }
  void reduce(const TensorView& out) const {
    if (columns) column_sums(lines.data(), columns, lines.size() / columns, columns, false, out.as<float>());
  }
};

// Accumulator 0 holds grad_output w_down.
template <class T, class Activation>
void write_grad_hidden(const ops::FeedForwardBackward& p, const Dropout& dropout, BlockSums& b_up, BlockSums& b_gate,
                       const Tile& tile) {
  Keep keep(dropout);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row + r, column = tile.column;
    const float* sums = tile.c[0] + r * tile.stride;
    const T *up = at<T>(p.up, row, column), *gate = at<T>(p.gate, row, column);
    T *hidden = at<T>(p.hidden, row, column), *grad_up = at<T>(p.grad_up, row, column),
      *grad_gate = at<T>(p.grad_gate, row, column);
    const float* kept = keep.of(tile, r);
    float *up_line = b_up.line(row, column), *gate_line = b_gate.line(row, column);
    for_lanes(tile.columns, [&](int64_t i, auto n) {
      const F k = load_n(kept + i, n), g = load_n(sums + i, n) * k, u = load_n(up + i, n);
      const Act act = Activation::of(gate ? load_n(gate + i, n) : u);
      if (hidden) store_n(hidden + i, (gate ? act.value * u : act.value) * k, n);
      const F to_up = g * (gate ? act.value : act.slope);
      store_n(grad_up + i, to_up, n);
      if (up_line) store_n(up_line + i, load_n(up_line + i, n) + to_up, n);
      if (!gate) return;
      const F to_gate = g * u * act.slope;
      store_n(grad_gate + i, to_gate, n);
      if (gate_line) store_n(gate_line + i, load_n(gate_line + i, n) + to_gate, n);
    });
  }
}

void ffn_forward(const ops::FeedForwardForward& p) {
  const int64_t tokens = p.input.size(0), d = p.input.size(1), f = p.w_up.size(0);
  const Dropout dropout{p.dropout_p, p.seed};
  const auto b_up = as_floats(p.b_up, f, 0.0f), b_gate = as_floats(p.b_gate, f, 0.0f);
  const auto b_down = as_floats(p.b_down, d, 0.0f);
  const Matrix x{p.input};
  const bool gated = p.w_gate.defined();
  visit_float(p.input.dtype, [&]<class T>(T) {
    visit_activation<T>(p.activation, [&]<class Activation>(Activation) {
      gemm(
          tokens, f, {{x, Matrix(p.w_up).t(), d, 0}, {x, Matrix(p.w_gate).t(), gated ? d : 0, gated}},
          [&](const Tile& tile) { write_hidden<T, Activation>(p, dropout, b_up.data(), b_gate.data(), tile); },
          p.hidden, p.up);
    });
  });
  if (!p.output.defined()) return;
  gemm(
      tokens, d, {{Matrix(p.hidden), Matrix(p.w_down).t(), f}},
      [&](const Tile& tile) { store_tile(tile, p.output, b_down.data(), p.residual); }, p.output);
}

// grad^T x, for a parameter (out, in) that x (tokens, in) went through to where `grad` (tokens, out) comes from
void weight_gradient(const TensorView& grad, const TensorView& x, const TensorView& out, bool add) {
  if (!out.defined()) return;
  gemm(
      out.size(0), out.size(1), {{Matrix(grad).t(), Matrix(x), x.size(0)}},
      [&](const Tile& tile) { add ? add_tile(tile, out) : store_tile(tile, out); }, out);
}

void ffn_backward(const ops::FeedForwardBackward& p) {
  const int64_t tokens = p.input.size(0), d = p.input.size(1), f = p.w_up.size(0);
  const Dropout dropout{p.dropout_p, p.seed};
  const bool past_hidden = p.grad_input.defined() || p.grad_w_up.defined() || p.grad_b_up.defined() ||
                           p.grad_w_gate.defined() || p.grad_b_gate.defined();
  BlockSums b_up{p.grad_b_up, tokens}, b_gate{p.grad_b_gate, tokens};
  if (past_hidden || p.grad_w_down.defined()) {
    visit_float(p.input.dtype, [&]<class T>(T) {
      visit_activation<T>(p.activation, [&]<class Activation>(Activation) {
        gemm(
            tokens, f, {{Matrix(p.grad_output), Matrix(p.w_down), past_hidden ? d : 0}},
            [&](const Tile& tile) { write_grad_hidden<T, Activation>(p, dropout, b_up, b_gate, tile); }, p.grad_up,
            p.hidden);
      });
    });
  }
  weight_gradient(p.grad_output, p.hidden, p.grad_w_down, p.add_w_down);
  weight_gradient(p.grad_up, p.input, p.grad_w_up, p.add_w_up);
  weight_gradient(p.grad_gate, p.input, p.grad_w_gate, p.add_w_gate);
  b_up.reduce(p.grad_b_up);
  b_gate.reduce(p.grad_b_gate);
  if (p.grad_b_down.defined()) {
    visit_float(p.grad_output.dtype, [&]<class T>(T) {
      column_sums(p.grad_output.as<T>(), p.grad_output.stride(0), tokens, d, false, p.grad_b_down.as<float>());
    });
  }
  if (p.grad_input.defined()) {
    gemm(
        tokens, d,
        {{Matrix(p.grad_up), Matrix(p.w_up), f}, {Matrix(p.grad_gate), Matrix(p.w_gate), p.w_gate.defined() ? f : 0}},
        [&](const Tile& tile) { store_tile(tile, p.grad_input); }, p.grad_input);
  }
}

const Registrar<ops::FeedForwardForward> forward{ffn_forward};
const Registrar<ops::FeedForwardBackward> backward{ffn_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
