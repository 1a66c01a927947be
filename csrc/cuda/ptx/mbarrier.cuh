// Barriers in shared memory that count arrivals and bytes, and bulk copies that report to them (PTX ISA, "mbarrier",
// "cp.async.bulk"; sm_90).
//
//   A barrier goes from phase to phase. A phase ends when as many threads have arrived as mbarrier_init said, and as
//   many bytes as were expected have come; the next begins at once, with the same number of arrivals to wait for.
//   Phases have parities 0, 1, 0, ...: mbarrier_wait(b, parity) waits for the end of the phase of this parity, current
//   or last. So on a fresh barrier a wait for parity 1 returns at once: a producer's first look at an empty buffer.
//
//     if (threadIdx.x == 0) {
//       mbarrier_init(full, 1);
//       mbarrier_init_fence();                     // also for the unit that carries out bulk copies
//     }
//     __syncthreads();
//     if (threadIdx.x == 0) {
//       mbarrier_arrive_expect_tx(full, bytes);
//       copy_bulk(tile, source, bytes, full);      // addresses and size are multiples of 16
//     }
//     mbarrier_wait(full, 0);                      // every thread that reads the tile
//
//   An arrival releases what its thread did before, a wait that succeeds acquires it. On a processor below sm_90 these
//   stop the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/memory.cuh"

namespace llmengine::ptx {

struct Mbarrier {
  uint64_t state;
};

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(arrivals)
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void mbarrier_init_fence() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(barrier)) : "memory");
#else
  __trap();
#endif
}

// First expects `bytes` more in this phase, then arrives.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(detail::shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Expects `bytes` more in this phase.
__device__ __forceinline__ void mbarrier_expect_tx(Mbarrier* barrier, int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Arrives when all copies of async_copy.cuh that this thread has begun are there: as one of the arrivals that the phase
// waits for. It tells of these copies alone, not of what the thread wrote.
__device__ __forceinline__ void mbarrier_arrive_for_copies(Mbarrier* barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(detail::shared_address(barrier))
               : "memory");
#else
  __trap();
#endif
}

// The same as one arrival more: the phase waits for it besides those that it waits for anyhow.
__device__ __forceinline__ void mbarrier_arrive_also_for_copies(Mbarrier* barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(detail::shared_address(barrier)) : "memory");
#else
  __trap();
#endif
}

// Whether the phase has ended; waits for it a while.
__device__ __forceinline__ bool mbarrier_try_wait(Mbarrier* barrier, int parity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n"
      "}"
      : "=r"(ended)
      : "r"(detail::shared_address(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
#else
  __trap();
  return false;
#endif
}

__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
  while (!mbarrier_try_wait(barrier, parity)) {}
}

// By one thread, of any number of bytes. The bytes are reported to the barrier when they have come.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, Mbarrier* barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   detail::shared_address(shared)),
               "l"(global), "r"(bytes), "r"(detail::shared_address(barrier))
               : "memory");
#else
  __trap();
#endif
}

}  // namespace llmengine::ptx
