// Copies from global to shared memory that go on while the thread does other things (PTX ISA, "cp.async"; sm_80).
//
//   copy_async_16(tile, row);       begun; the destination is nobody's until it is waited for
//   commit_copies();                all that this thread began since its last commit is a group
//   wait_copies<1>();               all groups of this thread but the latest 1 have arrived: this thread may read them,
//   __syncthreads();                and behind a barrier so may the others
//
// Both addresses are multiples of the size. Of the source only the first `bytes` (0 up to the size) are read, and none
// of it where they are 0; the rest of the destination becomes zeros: so rows and columns past an edge cost no branch.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/memory.cuh"

namespace llmengine::ptx {

// Past the first-level cache: for what no other block's thread on this multiprocessor reads soon.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}

// Through the first-level cache: the only way that PTX has for these sizes.
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, int bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_4(void* shared, const void* global, int bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `pending` latest groups of this thread are under way; with 0, for every one of them.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  static_assert(pending >= 0);
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace llmengine::ptx
