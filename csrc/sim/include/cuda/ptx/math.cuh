// Twin of csrc/cuda/ptx/math.cuh. It errs by as much as the hardware may, up or down by a bit of the argument, so that
// what holds here holds there.
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

__forceinline__ float exp2_approx(float x) {
  const double exact = std::exp2(static_cast<double>(x));
  if (x == 0.0f || !std::isfinite(exact)) return static_cast<float>(exact);
  const double off = std::bit_cast<uint32_t>(x) & 1 ? 0x1p-22 : -0x1p-22;
  const auto value = static_cast<float>(exact * (1.0 + off * 0.75));  // the rest is this rounding's
  return value < 0x1p-126f ? 0.0f : value;
}

}  // namespace llmengine::ptx
