// Functions of the special function unit (PTX ISA, "ex2").
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

// 2^x with a relative error of at most 2^-22; results below the least normal float are 0. One instruction.
__device__ __forceinline__ float exp2_approx(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

}  // namespace llmengine::ptx
