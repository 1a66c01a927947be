// Attention (ops/attention.h) on Hopper, by TMA and wgmma (attention_sm90a_*.cu), of what tensor maps can tell:
// operands that are not empty, begin at multiples of 16 bytes and have strides that are positive multiples of them.
// Backward, the statistics of rows and the gradients of biases are those of every GPU's kernels.
#pragma once

#include <tuple>

#include "cuda/attention.h"
#include "cuda/device.h"
#include "ops/attention.h"

namespace llmengine::cuda {

struct AttentionForwardSm90a : ops::AttentionForward {
  TensorView turns;  // int32 (1,), 0: from which blocks draw their tiles

  static constexpr auto fields() {
    using P = AttentionForwardSm90a;
    return std::tuple_cat(ops::AttentionForward::fields(), std::tuple{ops::field("turns", &P::turns)});
  }
};

struct AttentionBackwardSm90a : AttentionBackward {
  TensorView turns;  // int32 (2,), 0: of each kernel's blocks

  static constexpr auto fields() {
    using P = AttentionBackwardSm90a;
    return std::tuple_cat(AttentionBackward::fields(), std::tuple{ops::field("turns", &P::turns)});
  }
};

void validate(const AttentionForwardSm90a& p);
void validate(const AttentionBackwardSm90a& p);
void run(const AttentionForwardSm90a& p, Stream stream);
void run(const AttentionBackwardSm90a& p, Stream stream);

}  // namespace llmengine::cuda
