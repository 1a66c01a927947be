// Conversions between float and narrower floats, and integers (PTX ISA, "cvt"): to nearest, ties to even. To 8 bits,
// what is beyond the largest number becomes it, infinities too; NaN stays NaN (sm_89 and later).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmengine::ptx {

__device__ __forceinline__ float float_of_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// What is beyond the integers becomes the last of them, NaN 0.
__device__ __forceinline__ int32_t nearest_integer(float value) {
  int32_t integer;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(integer) : "f"(value));
  return integer;
}

// Two at once: `low` into the lower half of the word.
__device__ __forceinline__ uint32_t bf16x2_of(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ uint32_t f16x2_of(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// `low` into the lower byte.
__device__ __forceinline__ uint16_t e4m3x2_of(float low, float high) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  uint16_t word;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(word) : "f"(high), "f"(low));
  return word;
#else
  __trap();
#endif
}

__device__ __forceinline__ uint16_t e5m2x2_of(float low, float high) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  uint16_t word;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(word) : "f"(high), "f"(low));
  return word;
#else
  __trap();
#endif
}

}  // namespace llmengine::ptx
