// A number that the compiler knows nothing of. What follows from it is made anew in each round of a loop, where the
// compiler would make it once, before the loop, and keep it in registers: descriptors and addresses of all parts of a
// tile take dozens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmengine::ptx {

__device__ __forceinline__ int made_here(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

__device__ __forceinline__ uint64_t made_here(uint64_t number) {
  asm volatile("" : "+l"(number));
  return number;
}

}  // namespace llmengine::ptx
