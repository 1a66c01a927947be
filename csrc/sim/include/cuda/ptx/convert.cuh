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

// A float of `mantissa` bits whose least normal number is 2^least and largest `most`; NaN is all ones.
template <int mantissa, int least>
uint32_t to_byte(float value, float most) {
  if (std::isnan(value)) return 0x7f;
  const uint32_t sign = std::bit_cast<uint32_t>(value) >> 24 & 0x80;
  const float magnitude = std::fmin(std::fabs(value), most);
  constexpr int dropped = 23 - mantissa;
  // below the least normal number the unit stays: a sum with 2^23 units puts the rounding where it belongs
  const float anchor = std::ldexp(1.0f, least - mantissa + 23);
  if (magnitude < std::ldexp(1.0f, least)) {
    return sign | (std::bit_cast<uint32_t>(magnitude + anchor) - std::bit_cast<uint32_t>(anchor));
  }
  const uint32_t rebased = std::bit_cast<uint32_t>(magnitude) - (static_cast<uint32_t>(126 + least) << 23);
  return sign | ((rebased + (1u << (dropped - 1)) - 1 + (rebased >> dropped & 1)) >> dropped);
}
inline uint32_t to_e4m3(float value) { return to_byte<3, -6>(value, 448.0f); }
inline uint32_t to_e5m2(float value) { return to_byte<2, -14>(value, 57344.0f); }

inline float from_e4m3(uint32_t byte) {
  const uint32_t exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float magnitude = (byte & 0x7f) == 0x7f ? std::bit_cast<float>(0x7fffffffu)
                          : exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), static_cast<int>(exponent) - 10);
  return byte & 0x80 ? -magnitude : magnitude;
}
inline float from_e5m2(uint32_t byte) { return from_f16(byte << 8); }

}  // namespace twin

__forceinline__ float float_of_f16(uint16_t bits) { return twin::from_f16(bits); }
__forceinline__ int32_t nearest_integer(float value) {
  if (std::isnan(value)) return 0;
  if (std::fabs(value) >= 0x1p31f) return value < 0 ? INT32_MIN : INT32_MAX;
  return static_cast<int32_t>(std::nearbyint(value));
}
__forceinline__ uint32_t bf16x2_of(float low, float high) { return twin::to_bf16(low) | twin::to_bf16(high) << 16; }
__forceinline__ uint32_t f16x2_of(float low, float high) { return twin::to_f16(low) | twin::to_f16(high) << 16; }

__forceinline__ uint16_t e4m3x2_of(float low, float high) {
  return static_cast<uint16_t>(twin::to_e4m3(low) | twin::to_e4m3(high) << 8);
}
__forceinline__ uint16_t e5m2x2_of(float low, float high) {
  return static_cast<uint16_t>(twin::to_e5m2(low) | twin::to_e5m2(high) << 8);
}

}  // namespace llmengine::ptx
