// Attention (ops/attention.h) on CUDA, of bfloat16 and float16. attention_sm80_*.cu run on every GPU from sm_80 on.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/attention.h"

namespace llmengine::cuda {

struct AttentionForward : ops::AttentionForward {
  bool exact = false;  // kernels for the very head dim, up to a multiple of 16, where they can be had

  static constexpr auto fields() {
    using P = AttentionForward;
    return std::tuple_cat(ops::AttentionForward::fields(), std::tuple{ops::field("exact", &P::exact)});
  }
};

struct AttentionBackward : ops::AttentionBackward {
  TensorView shift, base, delta;  // room, like lse: what the kernels read of each row beside its operands
  TensorView partial_distances;   // float32 (places of kDistanceRows rows, heads, 2 M + 1): what is yet to be added up
                                  // along the first for grad_distance_bias, which is not looked at; or none
  bool exact = false;

  static constexpr auto fields() {
    using P = AttentionBackward;
    return std::tuple_cat(
        ops::AttentionBackward::fields(),
        std::tuple{ops::field("shift", &P::shift), ops::field("base", &P::base), ops::field("delta", &P::delta),
                   ops::field("partial_distances", &P::partial_distances), ops::field("exact", &P::exact)});
  }
};

inline constexpr int kDistanceRows = 64;  // of a part: parts have the places of attention_places.h

void validate(const AttentionForward& p);
void validate(const AttentionBackward& p);
void run(const AttentionForward& p, Stream stream);
void run(const AttentionBackward& p, Stream stream);

}  // namespace llmengine::cuda
