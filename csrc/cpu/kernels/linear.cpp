// Linear layer, forward and backward (formulas: ops/linear.h), as products (cpu/gemm.h) whose tiles end with the bias
// and the rounding. Multiply-adds: tokens in out, twice that backward. Limit: the multiply-add units.
#include "ops/linear.h"

#include "cpu/gemm.h"
#include "cpu/lines.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

void linear_forward(const ops::LinearForward& p) {
  const auto bias = as_floats(p.bias, p.weight.size(0), 0.0f);
  gemm(
      p.input.size(0), p.weight.size(0), {{Matrix(p.input), Matrix(p.weight).t(), p.input.size(1)}},
      [&](const Tile& tile) { store_tile(tile, p.output, bias.data()); }, p.output);
}

void linear_backward(const ops::LinearBackward& p) {
  const int64_t tokens = p.input.size(0), in = p.input.size(1), out = p.weight.size(0);
  if (p.grad_input.defined()) {
    gemm(
        tokens, in, {{Matrix(p.grad_output), Matrix(p.weight), out}},
        [&](const Tile& tile) { store_tile(tile, p.grad_input); }, p.grad_input);
  }
  if (p.grad_weight.defined()) {
    gemm(
        out, in, {{Matrix(p.grad_output).t(), Matrix(p.input), tokens}},
        [&](const Tile& tile) { p.add_weight ? add_tile(tile, p.grad_weight) : store_tile(tile, p.grad_weight); },
        p.grad_weight);
  }
  if (p.grad_bias.defined()) {
    visit_float(p.grad_output.dtype, [&]<class T>(T) {
      column_sums(p.grad_output.as<T>(), p.grad_output.stride(0), tokens, out, false, p.grad_bias.as<float>());
    });
  }
}

const Registrar<ops::LinearForward> forward{linear_forward};
const Registrar<ops::LinearBackward> backward{linear_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
