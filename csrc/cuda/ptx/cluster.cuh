// Blocks of a cluster: they run together, meet at a barrier, and reach into each other's shared memory (PTX ISA,
// "barrier.cluster", "mapa", "ld.shared::cluster"; sm_90). The launch says how many are one (launch.cuh).
//
//   A block may touch another's shared memory from the first barrier on that both have passed, and until the other
//   ends: so a barrier stands at the beginning, behind the mbarriers' initialisation, and one at the end.
//
//     cluster_sync();
//     const ClusterAddress theirs = map_to_block(slot, other);   // the same place in the other block's memory
//     store_cluster_4(theirs, word);
//     cluster_sync();                                            // both see what was written
//
//   An mbarrier of another block is arrived at by mbarrier_release_cluster; mbarrier_wait_cluster on that block's side
//   acquires what threads of other blocks did before. Only a block's own threads wait for its mbarriers. A release for
//   other blocks waits until all that the thread has written anywhere is there for the whole GPU. Where nothing but
//   asynchronous reads of a tile have ended, after which it is overwritten, mbarrier_arrive_cluster says so for
//   nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"

namespace llmengine::ptx {

struct ClusterAddress {
  uint32_t bits;

  __device__ __forceinline__ ClusterAddress operator+(uint32_t bytes) const { return {bits + bytes}; }
};

__device__ __forceinline__ int block_in_cluster() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  int block;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
  return block;
#else
  __trap();
  return 0;
#endif
}

__device__ __forceinline__ int blocks_of_cluster() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  int blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#else
  __trap();
  return 0;
#endif
}

// An arrival releases what its thread did before, a wait acquires it. Each thread arrives, then waits.
__device__ __forceinline__ void cluster_arrive() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}

// Releases nothing: where nothing but the blocks' being there is to be known.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where the same place lies in the shared memory of block `block` of the cluster.
__device__ __forceinline__ ClusterAddress map_to_block(const void* shared, int block) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  ClusterAddress theirs;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(theirs.bits)
               : "r"(detail::shared_address(shared)), "r"(block));
  return theirs;
#else
  __trap();
  return {0};
#endif
}

__device__ __forceinline__ uint32_t load_cluster_4(ClusterAddress from) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t word;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(from.bits) : "memory");
  return word;
#else
  __trap();
  return 0;
#endif
}

__device__ __forceinline__ uint4 load_cluster_16(ClusterAddress from) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint4 word;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(from.bits)
               : "memory");
  return word;
#else
  __trap();
  return make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void store_cluster_4(ClusterAddress to, uint32_t word) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to.bits), "r"(word) : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void store_cluster_16(ClusterAddress to, uint4 word) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to.bits), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
#else
  __trap();
#endif
}

// Tells other blocks what this thread has waited for of what goes on asynchronously: that boxes have come, that
// products have read their operands. Of what threads read or wrote themselves it tells its own block alone (".cta").
__device__ __forceinline__ void mbarrier_arrive_cluster(ClusterAddress barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(barrier.bits) : "memory");
#else
  __trap();
#endif
}

// Tells other blocks all that this thread knew or did.
__device__ __forceinline__ void mbarrier_release_cluster(ClusterAddress barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.bits) : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void mbarrier_wait_cluster(Mbarrier* barrier, int parity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(detail::shared_address(barrier)), "r"(parity)
        : "memory");
  }
#else
  __trap();
#endif
}

}  // namespace llmengine::ptx
