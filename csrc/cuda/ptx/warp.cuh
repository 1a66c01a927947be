// What a warp does as one (PTX ISA, "elect.sync", "setmaxnreg"; sm_90).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmengine::ptx {

// True in one lane of the warp, which comes as a whole; always the same one, but not said which.
__device__ __forceinline__ bool elect_one() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
#else
  __trap();
  return false;
#endif
}

// Registers of each thread from here on, a multiple of 8 from 24 to 256. All warps of a warpgroup do it. What some give
// up, others of the block may take: they wait until there are enough. A block has what it was launched with, an even
// share of the multiprocessor's 65536 where `__launch_bounds__(threads, 1)` binds the kernel; without it or another
// bound on registers the instruction is ignored. sm_90a and its like only.
template <int count>
__device__ __forceinline__ void increase_registers() {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0);
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#else
  __trap();
#endif
}

template <int count>
__device__ __forceinline__ void decrease_registers() {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0);
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#else
  __trap();
#endif
}

}  // namespace llmengine::ptx
