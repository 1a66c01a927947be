// Boxes of tensors between global and shared memory, copied by the asynchronous unit (PTX ISA, "cp.async.bulk.tensor",
// tiled mode; sm_90). One thread asks for a box; a tensor map (tensor_map.cuh) says what a box is.
//
//   Coordinates are those of the box's first element, the fastest running dimension first; they may lie outside of the
//   tensor, before it too. To shared memory what lies outside comes as zeros, and counts as bytes that come; to global
//   memory it is left out. In shared memory a box begins at a multiple of 128 bytes, or of the swizzle's period: there
//   the 16-byte chunk c of row r lies at chunk c ^ r (rows of 128 bytes: r % 8; of 64: r / 2 % 4; of 32: r / 4 % 2).
//
//     copy_tensor(tile, &map, full, column, row);           to shared memory, reported to mbarrier `full`
//
//     tile[...] = ...;                                      to global memory: every thread writes
//     fence_async_shared();                                 and shows the asynchronous unit what it wrote
//     __syncthreads();
//     if (threadIdx.x == 0) {
//       store_tensor(&map, tile, column, row);
//       commit_stores();                                    a group, as of copies (async_copy.cuh)
//       wait_store_reads<0>();                              its tile may be written again; also before the block ends
//     }
//
//   The fence stands between writes by threads (and copies by copy_async, when they have been waited for) and whatever
//   the asynchronous unit does with the same bytes, products of warpgroups included. No fence is needed for threads
//   to read what has been waited for, or for the unit to overwrite what threads have read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tensor_map.cuh"

namespace llmengine::ptx {

// Ahead of its first use, by one thread.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  __trap();
#endif
}

template <class... Place>
__device__ __forceinline__ void copy_tensor(void* shared, const TensorMap* map, Mbarrier* barrier, Place... place) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int rank = sizeof...(place);
  static_assert(rank >= 1 && rank <= 5);
  const int at[] = {static_cast<int>(place)...};
  if constexpr (rank == 1) {
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::
            "r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "r"(at[0])
        : "memory");
  }
  if constexpr (rank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "r"(at[0]), "r"(at[1])
        : "memory");
  }
  if constexpr (rank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  }
  if constexpr (rank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
  if constexpr (rank == 5) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
        "%7}], [%2];" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
#else
  __trap();
#endif
}

// To the same place in the shared memory of every block of the cluster whose bit is set in `blocks`, reported to the
// mbarrier at the same place there.
template <class... Place>
__device__ __forceinline__ void copy_tensor_multicast(void* shared, const TensorMap* map, Mbarrier* barrier,
                                                      uint16_t blocks, Place... place) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int rank = sizeof...(place);
  static_assert(rank >= 1 && rank <= 5);
  const int at[] = {static_cast<int>(place)...};
  if constexpr (rank == 1) {
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4}], [%2], %3;" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "h"(blocks), "r"(at[0])
        : "memory");
  }
  if constexpr (rank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5}], [%2], %3;" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "h"(blocks), "r"(at[0]), "r"(at[1])
        : "memory");
  }
  if constexpr (rank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6}], [%2], %3;" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  }
  if constexpr (rank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
  if constexpr (rank == 5) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(detail::shared_address(shared)),
        "l"(map), "r"(detail::shared_address(barrier)), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
        "r"(at[4])
        : "memory");
  }
#else
  __trap();
#endif
}

template <class... Place>
__device__ __forceinline__ void store_tensor(const TensorMap* map, const void* shared, Place... place) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int rank = sizeof...(place);
  static_assert(rank >= 1 && rank <= 5);
  const int at[] = {static_cast<int>(place)...};
  if constexpr (rank == 1) {
    asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%0, {%2}], [%1];" ::"l"(map),
                 "r"(detail::shared_address(shared)), "r"(at[0])
                 : "memory");
  }
  if constexpr (rank == 2) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(detail::shared_address(shared)), "r"(at[0]), "r"(at[1])
                 : "memory");
  }
  if constexpr (rank == 3) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(detail::shared_address(shared)), "r"(at[0]), "r"(at[1]), "r"(at[2])
                 : "memory");
  }
  if constexpr (rank == 4) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(detail::shared_address(shared)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
  }
  if constexpr (rank == 5) {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
        "r"(detail::shared_address(shared)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
#else
  __trap();
#endif
}

// Adds to what is there, each element by itself: what others add meanwhile is not lost.
template <class... Place>
__device__ __forceinline__ void add_tensor(const TensorMap* map, const void* shared, Place... place) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int rank = sizeof...(place);
  static_assert(rank >= 1 && rank <= 5);
  const int at[] = {static_cast<int>(place)...};
  if constexpr (rank == 1) {
    asm volatile("cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.tile.bulk_group [%0, {%2}], [%1];" ::"l"(map),
                 "r"(detail::shared_address(shared)), "r"(at[0])
                 : "memory");
  }
  if constexpr (rank == 2) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(detail::shared_address(shared)), "r"(at[0]), "r"(at[1])
        : "memory");
  }
  if constexpr (rank == 3) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
        "r"(detail::shared_address(shared)), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  }
  if constexpr (rank == 4) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(detail::shared_address(shared)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
  if constexpr (rank == 5) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
            map),
        "r"(detail::shared_address(shared)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
#else
  __trap();
#endif
}

// Bytes that lie together on both sides, of any number; addresses and number are multiples of 16.
__device__ __forceinline__ void store_bulk(void* global, const void* shared, int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(detail::shared_address(shared)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void add_bulk(float* global, const float* shared, int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(detail::shared_address(shared)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Of integers, modulo 2^32: whatever order they come in, the sum is the same.
__device__ __forceinline__ void add_bulk(int32_t* global, const int32_t* shared, int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(global),
               "r"(detail::shared_address(shared)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void commit_stores() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  __trap();
#endif
}

// Waits until at most the `pending` latest groups of this thread are under way: what they write is there.
template <int pending>
__device__ __forceinline__ void wait_stores() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
#else
  __trap();
#endif
}

// Waits until at most the `pending` latest groups still read shared memory.
template <int pending>
__device__ __forceinline__ void wait_store_reads() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
#else
  __trap();
#endif
}

// What this thread has written to its block's shared memory is there for the asynchronous unit.
__device__ __forceinline__ void fence_async_shared() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}

// The same, of what it has written to other blocks' shared memory, too. Like fence_async, it waits for the whole GPU.
__device__ __forceinline__ void fence_async_cluster() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cluster;" ::: "memory");
#else
  __trap();
#endif
}

// The same for all memory.
__device__ __forceinline__ void fence_async() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#else
  __trap();
#endif
}

}  // namespace llmengine::ptx
