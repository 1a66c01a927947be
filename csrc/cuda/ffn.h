// The elementwise half of the feed-forward block (ops/ffn.h) on CUDA, between products that a BLAS makes: from the
// pre-activations, with their biases, to the hidden layer, and from its gradient to theirs.
#pragma once

#include <string>
#include <tuple>

#include "cuda/device.h"
#include "ops/ffn.h"

namespace llmengine::cuda {

struct HiddenForward {
  TensorView up, gate;  // (tokens, f), unit last stride; gate: none where the block is not gated
  TensorView seed;      // int64 (1,), where dropout_p > 0
  std::string activation;
  double dropout_p = 0.0;
  TensorView hidden;  // like up

  static constexpr auto fields() {
    using P = HiddenForward;
    return std::tuple{ops::field("up", &P::up),
                      ops::field("gate", &P::gate),
                      ops::field("seed", &P::seed),
                      ops::field("activation", &P::activation),
                      ops::field("dropout_p", &P::dropout_p),
                      ops::field("hidden", &P::hidden)};
  }
};

struct HiddenBackward {
  TensorView grad_hidden;  // (tokens, f), unit last stride, as all
  TensorView up, gate, seed;
  std::string activation;
  double dropout_p = 0.0;
  TensorView grad_up, grad_gate;  // grad_up may be grad_hidden; grad_gate only with gate
  TensorView hidden;              // once more, or none: not wanted

  static constexpr auto fields() {
    using P = HiddenBackward;
    return std::tuple{ops::field("grad_hidden", &P::grad_hidden),
                      ops::field("up", &P::up),
                      ops::field("gate", &P::gate),
                      ops::field("seed", &P::seed),
                      ops::field("activation", &P::activation),
                      ops::field("dropout_p", &P::dropout_p),
                      ops::field("grad_up", &P::grad_up),
                      ops::field("grad_gate", &P::grad_gate),
                      ops::field("hidden", &P::hidden)};
  }
};

void validate(const HiddenForward& p);
void validate(const HiddenBackward& p);
void run(const HiddenForward& p, Stream stream);
void run(const HiddenBackward& p, Stream stream);

}  // namespace llmengine::cuda
