// The feed-forward block (ops/ffn.h) on CUDA. Its elementwise half between products that a BLAS makes (ffn.cu): from
// the pre-activations, with their biases, to the hidden layer, and from its gradient to theirs. And, of bfloat16 and
// float16, the whole block with products of our own (ffn_products.cu).
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

struct FeedForwardForward : ops::FeedForwardForward {
  TensorView room;  // of the products, as `core`: Gemm's
  std::string core;

  static constexpr auto fields() {
    using P = FeedForwardForward;
    return std::tuple_cat(ops::FeedForwardForward::fields(),
                          std::tuple{ops::field("room", &P::room), ops::field("core", &P::core)});
  }
};

struct FeedForwardBackward : ops::FeedForwardBackward {
  // float32 (2 rows a tile of 128 tokens, f): what is to be added up for grad_b_up and grad_b_gate, where wanted
  TensorView partial_up, partial_gate;
  TensorView partial_down;  // float32 (parts, d): room, where grad_b_down is wanted
  TensorView room;          // of the products, as `core`: Gemm's
  std::string core;

  static constexpr auto fields() {
    using P = FeedForwardBackward;
    return std::tuple_cat(
        ops::FeedForwardBackward::fields(),
        std::tuple{ops::field("partial_up", &P::partial_up), ops::field("partial_gate", &P::partial_gate),
                   ops::field("partial_down", &P::partial_down), ops::field("room", &P::room),
                   ops::field("core", &P::core)});
  }
};

void validate(const FeedForwardForward& p);
void validate(const FeedForwardBackward& p);
void run(const FeedForwardForward& p, Stream stream);
void run(const FeedForwardBackward& p, Stream stream);

void validate(const HiddenForward& p);
void validate(const HiddenBackward& p);
void run(const HiddenForward& p, Stream stream);
void run(const HiddenBackward& p, Stream stream);

}  // namespace llmengine::cuda
