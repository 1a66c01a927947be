// Products of matrices of bfloat16 and float16 on Hopper, by TMA and wgmma (gemm_sm90a.cu).
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/fields.h"

namespace llmengine::cuda {

// out = a b
struct GemmSm90a {
  TensorView a, b;  // (m, k), (k, n), bfloat16 or float16; each with a unit stride in either dimension
  TensorView out;   // (m, n), of their dtype, rows contiguous

  static constexpr auto fields() {
    using P = GemmSm90a;
    return std::tuple{ops::field("a", &P::a), ops::field("b", &P::b), ops::field("out", &P::out)};
  }
};

void validate(const GemmSm90a& p);
void run(const GemmSm90a& p, Stream stream);

}  // namespace llmengine::cuda
