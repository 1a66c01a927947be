// What the CUDA backend adds to the contract of ops/norm.h: float16, a workspace for the backward, and a stream.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/norm.h"

namespace llmengine::cuda {

// Parameters (weight, bias) are float32 or of the rows' dtype.
struct NormForward : ops::NormForward {};

struct NormBackward : ops::NormBackward {
  // float32 (blocks, 2, columns): each block's share of grad_weight and grad_bias; as many blocks run as it has rows
  TensorView partial;

  static constexpr auto fields() {
    return std::tuple_cat(ops::NormBackward::fields(), std::tuple{ops::field("partial", &NormBackward::partial)});
  }
};

// The rows of `partial` that keep the whole device busy.
int64_t norm_backward_blocks(const TensorView& h);

void validate(const NormForward& p);
void validate(const NormBackward& p);
void run(const NormForward& p, Stream stream);
void run(const NormBackward& p, Stream stream);

}  // namespace llmengine::cuda
