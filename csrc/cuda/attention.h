// Attention (ops/attention.h) on CUDA, of bfloat16 and float16. attention_sm80_*.cu run on every GPU from sm_80 on.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/attention.h"

namespace llmengine::cuda {

struct AttentionForward : ops::AttentionForward {};

struct AttentionBackward : ops::AttentionBackward {
  TensorView base, delta;  // room, like lse: what the kernels read of each row beside its operands

  static constexpr auto fields() {
    using P = AttentionBackward;
    return std::tuple_cat(ops::AttentionBackward::fields(),
                          std::tuple{ops::field("base", &P::base), ops::field("delta", &P::delta)});
  }
};

void validate(const AttentionForward& p);
void validate(const AttentionBackward& p);
void run(const AttentionForward& p, Stream stream);
void run(const AttentionBackward& p, Stream stream);

}  // namespace llmengine::cuda
