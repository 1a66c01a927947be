// What the CUDA backend adds to the contract of ops/gradient_norm.h: float16, room for the blocks' sums, a stream.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/gradient_norm.h"

namespace llmengine::cuda {

inline constexpr int64_t kNormChunk = 8192;  // elements of a block

struct GradientNorm : ops::GradientNorm {
  TensorView sums;  // float64 (chunks of kNormChunk elements of each tensor,)

  static constexpr auto fields() {
    return std::tuple_cat(ops::GradientNorm::fields(), std::tuple{ops::field("sums", &GradientNorm::sums)});
  }
};

void validate(const GradientNorm& p);
void run(const GradientNorm& p, Stream stream);

}  // namespace llmengine::cuda
