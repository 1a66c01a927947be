// Cross-entropy of a linear layer (ops/linear_cross_entropy.h) on CUDA, of bfloat16 and float16. A target that is no
// class makes the loss and the gradients of its token NaN: nothing waits to say so.
#pragma once

#include <string>
#include <tuple>

#include "cuda/device.h"
#include "ops/linear_cross_entropy.h"

namespace llmengine::cuda {

struct LinearCrossEntropyForward : ops::LinearCrossEntropyForward {
  TensorView weight_sum;  // float32 (): of weight; needed with label smoothing
  TensorView partial;  // float32 (spans, 3, tokens): room for what is known of a token's logits in each span of classes
  TensorView target_logits;  // float32 (tokens,): room; of a shard, zeros
  std::string core;          // of the products: Gemm's

  static constexpr auto own_fields() {
    using P = LinearCrossEntropyForward;
    return std::tuple{ops::field("weight_sum", &P::weight_sum), ops::field("partial", &P::partial),
                      ops::field("target_logits", &P::target_logits), ops::field("core", &P::core)};
  }
  static constexpr auto fields() { return std::tuple_cat(ops::LinearCrossEntropyForward::fields(), own_fields()); }
  static constexpr auto shard_fields() {
    return std::tuple_cat(ops::LinearCrossEntropyForward::shard_fields(), own_fields());
  }
};

// `sums` is not looked at: see `low_input`.
struct LinearCrossEntropyBackward : ops::LinearCrossEntropyBackward {
  TensorView weight_sum;
  TensorView block;  // like input (a multiple of 128, or all tokens; a multiple of 128 classes): room for the gradient
                     // of so many tokens' logits of so many classes
  TensorView partial_bias;  // float32 (2 rows a tile of 128 tokens, as many), where grad_linear_bias is wanted
  // uint8, beside gradients of 16 bits that several products add up to (gemm.h): (tokens, d) where there are several
  // blocks of classes, (classes of a block, d) where there are several of tokens
  TensorView low_input, low_weight;
  TensorView room;  // of the products, as `core`: Gemm's
  std::string core;

  static constexpr auto own_fields() {
    using P = LinearCrossEntropyBackward;
    return std::tuple{ops::field("weight_sum", &P::weight_sum),
                      ops::field("block", &P::block),
                      ops::field("partial_bias", &P::partial_bias),
                      ops::field("low_input", &P::low_input),
                      ops::field("low_weight", &P::low_weight),
                      ops::field("room", &P::room),
                      ops::field("core", &P::core)};
  }
  static constexpr auto fields() { return std::tuple_cat(ops::LinearCrossEntropyBackward::fields(), own_fields()); }
  static constexpr auto shard_fields() {
    return std::tuple_cat(ops::LinearCrossEntropyBackward::shard_fields(), own_fields());
  }
};

// The same of a shard of the classes.
using LinearCrossEntropyShardForward = ops::LinearCrossEntropyShardForward<LinearCrossEntropyForward>;
using LinearCrossEntropyShardBackward = ops::LinearCrossEntropyShardBackward<LinearCrossEntropyBackward>;

void validate(const LinearCrossEntropyForward& p);
void validate(const LinearCrossEntropyBackward& p);
void validate(const LinearCrossEntropyShardForward& p);
void validate(const LinearCrossEntropyShardBackward& p);
void run(const LinearCrossEntropyForward& p, Stream stream);
void run(const LinearCrossEntropyBackward& p, Stream stream);

}  // namespace llmengine::cuda
