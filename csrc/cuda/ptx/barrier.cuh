// Named barriers (PTX ISA, "barrier"): some of a block's warps meet without the others. Id 0 is __syncthreads;
// `threads` counts those that wait and those that only arrive, in whole warps.
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace llmengine::ptx
