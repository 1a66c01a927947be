// Feed-forward block of a transformer layer, plain (Vaswani et al. 2017) or gated (Shazeer 2020, "GLU variants improve
// transformer"), on tokens: x is (tokens, d), the hidden layer (tokens, f), weights are (out, in).
//
//   up = x w_up^T + b_up,  gate = x w_gate^T + b_gate              the pre-activations, kept for the backward or there
//                                                                  made once more
//   hidden = act(up) keep / (1 - p)          or, gated,  act(gate) up keep / (1 - p)
//   output = hidden w_down^T + b_down + residual
//   act: gelu x Phi(x); gelu_tanh x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); relu max(x, 0);
//   relu_squared max(x, 0)^2 (So et al. 2021, "Primer"); silu x / (1 + exp(-x))
//
//   backward:  grad_hidden = grad_output w_down keep / (1 - p)
//              grad_up = grad_hidden act'(up)       or  grad_hidden act(gate),  grad_gate = grad_hidden up act'(gate)
//              grad_input = grad_up w_up + grad_gate w_gate
//              grad_w_up = grad_up^T x,  grad_w_gate = grad_gate^T x,  grad_w_down = grad_output^T hidden
//              a bias's gradient is the sum over tokens of what its sum passed on
//
// Dropout: ops/philox.h, stream 0, row = token, column = hidden unit.
#pragma once

#include <string>

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

enum class Activation { gelu, gelu_tanh, relu, relu_squared, silu };

inline Activation activation_of(const Checker& at, const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "relu_squared") return Activation::relu_squared;
  if (name == "silu") return Activation::silu;
  at.fail_at("activation", "is '" + name + "'; allowed: 'gelu', 'gelu_tanh', 'relu', 'relu_squared', 'silu'");
}

struct FeedForwardForward {
  TensorView input;           // (tokens, d)
  TensorView w_up, b_up;      // (f, d), (f,); every bias may be missing
  TensorView w_gate, b_gate;  // (f, d), (f,), or none
  TensorView w_down, b_down;  // (d, f), (d,)
  TensorView residual;        // (tokens, d), or none; its gradient is grad_output
  TensorView seed;            // int64 (1,), where dropout_p > 0
  std::string activation;
  double dropout_p = 0.0;
  TensorView output;    // (tokens, d); none: up and gate alone are wanted, from the first product
  TensorView hidden;    // (tokens, f): workspace, with output
  TensorView up, gate;  // (tokens, f), or none: not kept

  static constexpr auto fields() {
    using P = FeedForwardForward;
    return std::tuple{field("input", &P::input),
                      field("w_up", &P::w_up),
                      field("b_up", &P::b_up),
                      field("w_gate", &P::w_gate),
                      field("b_gate", &P::b_gate),
                      field("w_down", &P::w_down),
                      field("b_down", &P::b_down),
                      field("residual", &P::residual),
                      field("seed", &P::seed),
                      field("activation", &P::activation),
                      field("dropout_p", &P::dropout_p),
                      field("output", &P::output),
                      field("hidden", &P::hidden),
                      field("up", &P::up),
                      field("gate", &P::gate)};
  }
};

struct FeedForwardBackward {
  TensorView grad_output, input;    // (tokens, d)
  TensorView w_up, w_gate, w_down;  // as in the forward
  TensorView up, gate;              // what the forward kept
  TensorView seed;
  std::string activation;
  double dropout_p = 0.0;
  TensorView hidden, grad_up, grad_gate;  // (tokens, f): workspaces, for grad_w_down; always; with w_gate
  // like their tensors, those of biases float32; none: not wanted
  TensorView grad_input, grad_w_up, grad_b_up, grad_w_gate, grad_b_gate, grad_w_down, grad_b_down;
  // the gradient of that weight is float32, and what it holds grows
  bool add_w_up = false, add_w_gate = false, add_w_down = false;

  static constexpr auto fields() {
    using P = FeedForwardBackward;
    return std::tuple{field("grad_output", &P::grad_output),
                      field("input", &P::input),
                      field("w_up", &P::w_up),
                      field("w_gate", &P::w_gate),
                      field("w_down", &P::w_down),
                      field("up", &P::up),
                      field("gate", &P::gate),
                      field("seed", &P::seed),
                      field("activation", &P::activation),
                      field("dropout_p", &P::dropout_p),
                      field("hidden", &P::hidden),
                      field("grad_up", &P::grad_up),
                      field("grad_gate", &P::grad_gate),
                      field("grad_input", &P::grad_input),
                      field("grad_w_up", &P::grad_w_up),
                      field("grad_b_up", &P::grad_b_up),
                      field("grad_w_gate", &P::grad_w_gate),
                      field("grad_b_gate", &P::grad_b_gate),
                      field("grad_w_down", &P::grad_w_down),
                      field("grad_b_down", &P::grad_b_down),
                      field("add_w_up", &P::add_w_up),
                      field("add_w_gate", &P::add_w_gate),
                      field("add_w_down", &P::add_w_down)};
  }
};

// What a backend takes. `rounded`: weights in input's dtype alone, and float32 gradients of them, too.
struct FeedForwardTypes {
  std::initializer_list<DType> input;
  bool rounded;
};
inline constexpr std::initializer_list<DType> kFeedForwardInputs = {DType::f32, DType::bf16};
inline constexpr FeedForwardTypes kFeedForwardTypes = {kFeedForwardInputs, false};

// Sizes of one call, and the checks that forward and backward share.
struct FeedForwardChecker {
  Checker at;
  FeedForwardTypes types;
  DType dtype;  // of input
  int64_t tokens = 0, d = 0, f = 0;

  FeedForwardChecker(const char* op, const TensorView& input, const TensorView& w_up, const FeedForwardTypes& types)
      : at{op}, types(types), dtype(input.dtype) {
    at.defined(input, "input");
    at.defined(w_up, "w_up");
    at.dtype(input, "input", types.input);
    if (input.ndim != 2) at.fail_at("input", "must be (tokens, d), got " + input.shape());
    if (w_up.ndim != 2) at.fail_at("w_up", "must be (f, d), got " + w_up.shape());
    tokens = input.size(0), d = input.size(1), f = w_up.size(0);
    at.unit_last_stride(input, "input");
  }

  void matrices(NamedTensors tensors, std::initializer_list<DType> dtypes, int64_t rows, int64_t columns) const {
    for (auto [t, argument] : tensors) {
      at.dtype(*t, argument, dtypes);
      at.shape(*t, argument, {rows, columns});
      at.unit_last_stride(*t, argument);
    }
  }
  void parameters(NamedTensors tensors, int64_t rows, int64_t columns) const {
    matrices(tensors, {dtype, types.rounded ? dtype : DType::f32}, rows, columns);
  }
  void gradient(NamedTensor grad, const TensorView& weight, bool add) const {
    if (!weight.defined()) return;
    const DType wide = types.rounded ? DType::f32 : weight.dtype;
    matrices({grad}, {add ? DType::f32 : weight.dtype, add ? DType::f32 : wide}, weight.size(0), weight.size(1));
  }
  void activations(NamedTensors tensors, int64_t columns) const { matrices(tensors, {dtype}, tokens, columns); }

  void biases(NamedTensors tensors, std::initializer_list<DType> dtypes, int64_t size) const {
    for (auto [t, argument] : tensors) {
      at.dtype(*t, argument, dtypes);
      at.shape(*t, argument, {size});
      at.contiguous(*t, argument);
    }
  }

  void gated_only(const TensorView& w_gate, NamedTensors tensors) const {
    for (auto [t, argument] : tensors) {
      if (t->defined() && !w_gate.defined()) at.fail_at(argument, "was given without w_gate; give both, or neither");
    }
  }

  void options(const std::string& activation, double dropout_p, const TensorView& seed) const {
    activation_of(at, activation);
    at.probability(dropout_p, "dropout_p");
    if (dropout_p == 0) return;
    at.defined(seed, "seed");
    at.dtype(seed, "seed", {DType::i64});
    at.shape(seed, "seed", {1});
  }
};

inline void validate(const FeedForwardForward& p, const FeedForwardTypes& types = kFeedForwardTypes) {
  const FeedForwardChecker c{"ffn", p.input, p.w_up, types};
  c.at.defined(p.w_down, "w_down");
  if (p.output.defined()) {
    c.at.defined(p.hidden, "hidden");
  } else {
    c.at.defined(p.up, "up");
    if (p.w_gate.defined()) c.at.defined(p.gate, "gate");
  }
  c.parameters({{&p.w_up, "w_up"}, {&p.w_gate, "w_gate"}}, c.f, c.d);
  c.parameters({{&p.w_down, "w_down"}}, c.d, c.f);
  c.biases({{&p.b_up, "b_up"}, {&p.b_gate, "b_gate"}}, {c.dtype, DType::f32}, c.f);
  c.biases({{&p.b_down, "b_down"}}, {c.dtype, DType::f32}, c.d);
  c.activations({{&p.residual, "residual"}, {&p.output, "output"}}, c.d);
  c.activations({{&p.hidden, "hidden"}, {&p.up, "up"}, {&p.gate, "gate"}}, c.f);
  c.gated_only(p.w_gate, {{&p.b_gate, "b_gate"}, {&p.gate, "gate"}});
  c.options(p.activation, p.dropout_p, p.seed);
}

inline void validate(const FeedForwardBackward& p, const FeedForwardTypes& types = kFeedForwardTypes) {
  const FeedForwardChecker c{"ffn backward", p.input, p.w_up, types};
  const bool gated = p.w_gate.defined();
  for (auto [t, argument] :
       NamedTensors{{&p.grad_output, "grad_output"}, {&p.w_down, "w_down"}, {&p.up, "up"}, {&p.grad_up, "grad_up"}}) {
    c.at.defined(*t, argument);
  }
  if (p.grad_w_down.defined()) c.at.defined(p.hidden, "hidden");
  for (auto [t, argument] : NamedTensors{{&p.gate, "gate"}, {&p.grad_gate, "grad_gate"}}) {
    if (gated) c.at.defined(*t, argument);
  }
  c.parameters({{&p.w_up, "w_up"}, {&p.w_gate, "w_gate"}}, c.f, c.d);
  c.parameters({{&p.w_down, "w_down"}}, c.d, c.f);
  c.activations({{&p.grad_output, "grad_output"}, {&p.grad_input, "grad_input"}}, c.d);
  c.activations({{&p.up, "up"}, {&p.hidden, "hidden"}, {&p.grad_up, "grad_up"}}, c.f);
  c.gated_only(p.w_gate, {{&p.gate, "gate"},
                          {&p.grad_gate, "grad_gate"},
                          {&p.grad_w_gate, "grad_w_gate"},
                          {&p.grad_b_gate, "grad_b_gate"}});
  c.activations({{&p.gate, "gate"}, {&p.grad_gate, "grad_gate"}}, c.f);
  c.gradient({&p.grad_w_up, "grad_w_up"}, p.w_up, p.add_w_up);
  c.gradient({&p.grad_w_down, "grad_w_down"}, p.w_down, p.add_w_down);
  c.gradient({&p.grad_w_gate, "grad_w_gate"}, p.w_gate, p.add_w_gate);
  c.biases({{&p.grad_b_up, "grad_b_up"}, {&p.grad_b_gate, "grad_b_gate"}}, {DType::f32}, c.f);
  c.biases({{&p.grad_b_down, "grad_b_down"}}, {DType::f32}, c.d);
  c.options(p.activation, p.dropout_p, p.seed);
}

}  // namespace llmengine::ops
