// Twin of csrc/cuda/ptx/convert.cuh: the same roundings, to nearest and ties to even.
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

namespace twin {

__forceinline__ uint32_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__forceinline__ uint32_t to_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {  // subnormal: the unit is 2^-24, and adding 2^-1 puts the rounding where it belongs
    return sign | (std::bit_cast<uint32_t>(magnitude + 0x1p-1f) - std::bit_cast<uint32_t>(0x1p-1f));
  }
  const uint32_t rebased = (bits & 0x7fffffff) - (112u << 23);
  return sign | ((rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

__forceinline__ float from_f16(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff;
  if (exponent == 0)
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  const uint32_t rebased = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | rebased << 23 | mantissa << 13);
}

}  // namespace twin

__forceinline__ float float_of_f16(uint16_t bits) { return twin::from_f16(bits); }
__forceinline__ int32_t nearest_integer(float value) {
  if (std::isnan(value)) return 0;
  if (std::fabs(value) >= 0x1p31f) return value < 0 ? INT32_MIN : INT32_MAX;
  return static_cast<int32_t>(std::nearbyint(value));
}
__forceinline__ uint32_t bf16x2_of(float low, float high) { return twin::to_bf16(low) | twin::to_bf16(high) << 16; }
__forceinline__ uint32_t f16x2_of(float low, float high) { return twin::to_f16(low) | twin::to_f16(high) << 16; }

}  // namespace llmengine::ptx
