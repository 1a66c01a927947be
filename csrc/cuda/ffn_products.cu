// Feed-forward block, forward and backward, with the activation in the epilogues of its products (formulas: ops/ffn.h).
//
//   forward    hidden_product   x w_up^T, and of a gated block x w_gate^T beside it, so that a thread has both sums
//                               of a unit -> bias, activation, gate, dropout
//              gemm             hidden w_down^T + b_down + residual
//                               (without an output, the pre-activations alone, for a backward that was not left them)
//   backward   hidden_gradient  grad_output w_down -> times dropout, slope, gate: grad_up, grad_gate, hidden once more,
//                               and their sums over 64 tokens each for b_up and b_gate, which column_sums adds up. For
//                               b_down it goes over grad_output, which no product of ours makes, so that it is in no
//                               epilogue; and as an operand each block of a row of tiles would read and sum it anew
//              gemm             grad_up w_up + grad_gate w_gate in one accumulator; grad_up^T x, grad_gate^T x,
//                               grad_output^T hidden
//
//   flops      4 tokens d f forward, gated 6; twice that backward
//   bytes      beside operands: hidden written and read, the pre-activations written where they are kept, a residual
//              read by the second product's epilogue; backward the pre-activations read, grad_up, grad_gate and hidden
//              written once and read by two products or one
//   limit      the tensor cores, as of the products alone
#include "cuda/ffn_products.cuh"
#include "cuda/gemm.h"
#include "cuda/gemm_cores.h"
#include "cuda/gemm_host.h"

namespace llmengine::cuda {
namespace {

// a b, by the core that the call asks for.
template <class Params>
Gemm product_of(const Params& p, const TensorView& a, const TensorView& b, const TensorView& out) {
  Gemm product{};
  product.a = a, product.b = b, product.out = out, product.room = p.room, product.core = p.core;
  return product;
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

void validate(const FeedForwardForward& p) {
  ops::validate(p, {kProductTypes, true});
  check_core({"ffn"}, p.core, p.room);
}

void validate(const FeedForwardBackward& p) {
  ops::validate(p, {kProductTypes, true});
  const Checker at{"ffn backward"};
  check_core(at, p.core, p.room);
  const int64_t parts = 2 * gemm::tiles_of(p.input.size(0));
  check_partial(at, p.grad_b_up, p.partial_up, "partial_up", parts, p.w_up.size(0));
  check_partial(at, p.grad_b_gate, p.partial_gate, "partial_gate", parts, p.w_up.size(0));
  if (p.grad_b_down.defined()) validate(ColumnSums{p.grad_output, p.partial_down, p.grad_b_down});
}

void run(const FeedForwardForward& p, Stream stream) {
  gemm::check_sizes("ffn", {p.input.size(0), p.input.size(1), (p.w_gate.defined() ? 2 : 1) * p.w_up.size(0)});
  if (p.input.size(0) > 0 && p.w_up.size(0) > 0) {
    const NamedTensors operands = {{&p.input, "input"}, {&p.w_up, "w_up"}, {&p.w_gate, "w_gate"}};
    hopper_refuses(p.core, operands).empty() ? hidden_product_sm90a(p, stream) : hidden_product_sm80(p, stream);
  }
  if (!p.output.defined()) return;
  Gemm down = product_of(p, p.hidden, transposed(p.w_down), p.output);
  down.bias = p.b_down, down.added = p.residual;
  run(down, stream);
}

void run(const FeedForwardBackward& p, Stream stream) {
  gemm::check_sizes("ffn backward", {p.input.size(0), p.input.size(1), (p.w_gate.defined() ? 2 : 1) * p.w_up.size(0)});
  const auto multiply = [&](const TensorView& a, const TensorView& b, const TensorView& out, bool add) {
    if (!out.defined()) return;
    Gemm product = product_of(p, transposed(a), b, out);
    if (add) product.added = out;
    run(product, stream);
  };
  if (any_but_b_down(p) && p.w_up.size(0) > 0) {
    const NamedTensors operands = {{&p.grad_output, "grad_output"}, {&p.w_down, "w_down"}};
    hopper_refuses(p.core, operands).empty() ? hidden_gradient_sm90a(p, stream) : hidden_gradient_sm80(p, stream);
  }
  if (p.grad_input.defined()) {
    Gemm product = product_of(p, p.grad_up, p.w_up, p.grad_input);
    if (p.w_gate.defined()) product.a2 = p.grad_gate, product.b2 = p.w_gate;
    run(product, stream);
  }
  multiply(p.grad_up, p.input, p.grad_w_up, p.add_w_up);
  if (p.w_gate.defined()) multiply(p.grad_gate, p.input, p.grad_w_gate, p.add_w_gate);
  multiply(p.grad_output, p.hidden, p.grad_w_down, p.add_w_down);
  if (p.grad_b_up.defined()) run(ColumnSums{p.partial_up, {}, p.grad_b_up}, stream);
  if (p.grad_b_gate.defined()) run(ColumnSums{p.partial_gate, {}, p.grad_b_gate}, stream);
  if (p.grad_b_down.defined()) run(ColumnSums{p.grad_output, p.partial_down, p.grad_b_down}, stream);
}

}  // namespace llmengine::cuda
