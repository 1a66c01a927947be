// Loads and stores of 8 and 16 bytes with cache hints (PTX ISA, "Data Movement": ld, st). Addresses are multiples of
// the size. Volatile, so that they keep their order among each other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmengine::ptx {

namespace detail {

// As PTX instructions on shared memory take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace detail

// What this kernel reads once: it takes no room in the first-level cache.
__device__ __forceinline__ uint4 load_16_once(const void* address) {
  uint4 word;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address));
  return word;
}

// What other rows of the same block read again: weights, partial sums.
__device__ __forceinline__ uint4 load_16(const void* address) {
  uint4 word;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address));
  return word;
}

__device__ __forceinline__ uint2 load_8(const void* address) {
  uint2 word;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(address));
  return word;
}

__device__ __forceinline__ void store_16(void* address, uint4 word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word.x), "r"(word.y), "r"(word.z),
               "r"(word.w)
               : "memory");
}

__device__ __forceinline__ void store_8(void* address, uint2 word) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(word.x), "r"(word.y) : "memory");
}

// The block's dynamic shared memory, of the size that the launch asked for.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// The same from a multiple of 1024 bytes on, as tiles with a swizzle want it.
__device__ __forceinline__ void* dynamic_shared_1024() {
  extern __shared__ __align__(1024) uint4 aligned_dynamic_shared_memory[];
  return aligned_dynamic_shared_memory;
}

}  // namespace llmengine::ptx
