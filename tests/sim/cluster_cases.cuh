// Two blocks of a cluster that use their __shared__ variables, of which each has its own, in every way that there is.
// None has a mistake: test_hopper_cases.py knows what each gives.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tensor_copy.cuh"

namespace llmengine {
namespace {

enum class Way : uint8_t { copies, bulk_copies, bulk_stores, boxes, matrices, atomics, messages, own_address, rounds };

// Of a block: 128 threads and numbers, in and out. Boxes are of 4 rows of 32.
struct BlockOfCluster {
  static constexpr int kNumbers = 128, kBytes = 512;

  int t, block;
  const float* in;
  float* out;

  __device__ int other() const { return 1 - block; }
  __device__ int turned() const { return kNumbers - 1 - t; }
};

__device__ void start_phase(ptx::Mbarrier* full) {
  ptx::mbarrier_init(full, 1);
  ptx::mbarrier_init_fence();
  ptx::mbarrier_arrive_expect_tx(full, BlockOfCluster::kBytes);
}

__device__ void by_copies(const BlockOfCluster& my) {
  __shared__ uint4 tile[32];
  if (my.t < 32) ptx::copy_async_16(tile + my.t, my.in + 4 * my.t);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncthreads();
  my.out[my.t] = reinterpret_cast<const float*>(tile)[my.turned()];
}

__device__ void by_bulk_copies(const BlockOfCluster& my) {
  __shared__ uint4 tile[32];
  __shared__ ptx::Mbarrier full;
  if (my.t == 0) {
    start_phase(&full);
    ptx::copy_bulk(tile, my.in, BlockOfCluster::kBytes, &full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&full, 0);
  my.out[my.t] = reinterpret_cast<const float*>(tile)[my.turned()];
}

// Stored, and then added.
__device__ void by_bulk_stores(const BlockOfCluster& my) {
  alignas(128) __shared__ float tile[BlockOfCluster::kNumbers];
  tile[my.t] = my.in[my.t];
  ptx::fence_async_shared();
  __syncthreads();
  if (my.t != 0) return;
  ptx::store_bulk(my.out, tile, BlockOfCluster::kBytes);
  ptx::commit_stores();
  ptx::wait_stores<0>();
  ptx::add_bulk(my.out, tile, BlockOfCluster::kBytes);
  ptx::commit_stores();
  ptx::wait_store_reads<0>();
}

__device__ void by_boxes(const BlockOfCluster& my, const ptx::TensorMap& from, const ptx::TensorMap& to) {
  alignas(128) __shared__ float box[BlockOfCluster::kNumbers];
  __shared__ ptx::Mbarrier full;
  if (my.t != 0) return;
  start_phase(&full);
  ptx::copy_tensor(box, &from, &full, 0, 4 * my.block);
  ptx::mbarrier_wait(&full, 0);
  ptx::store_tensor(&to, box, 0, 4 * my.block);
  ptx::commit_stores();
  ptx::wait_store_reads<0>();
}

// One warp loads matrices and stores them elsewhere.
__device__ void by_matrices(const BlockOfCluster& my) {
  __shared__ uint4 given[32], stored[32];
  if (my.t >= 32) return;
  given[my.t] = ptx::load_16(my.in + 4 * my.t);
  __syncwarp();
  uint32_t r[4];
  ptx::load_matrix_x4(r, given + my.t);
  ptx::store_matrix_x4(stored + (31 - my.t), r);
  __syncwarp();
  ptx::store_16(my.out + 4 * my.t, stored[my.t]);
}

__device__ void by_atomics(const BlockOfCluster& my) {
  __shared__ int sum, largest;
  if (my.t == 0) sum = largest = 0;
  __syncthreads();
  atomicAdd(&sum, my.block + 1);
  atomicMax(&largest, my.t);
  __syncthreads();
  my.out[my.t] = static_cast<float>(sum + 1000 * largest);
}

// Copies arrive at an mbarrier; the other block writes to one's variable, and arrives at another.
__device__ void by_messages(const BlockOfCluster& my) {
  __shared__ uint4 tile[32];
  __shared__ float given[BlockOfCluster::kNumbers];
  __shared__ ptx::Mbarrier full, told;
  if (my.t == 0) {
    ptx::mbarrier_init(&full, BlockOfCluster::kNumbers);
    ptx::mbarrier_init(&told, BlockOfCluster::kNumbers);
    ptx::mbarrier_init_fence();
  }
  ptx::cluster_sync();
  if (my.t < 32) ptx::copy_async_16(tile + my.t, my.in + 4 * my.t);
  ptx::mbarrier_arrive_for_copies(&full);
  ptx::store_cluster_4(ptx::map_to_block(given, my.other()) + 4 * my.t, __float_as_uint(my.in[my.t]));
  ptx::mbarrier_release_cluster(ptx::map_to_block(&told, my.other()));
  ptx::mbarrier_wait(&full, 0);
  ptx::mbarrier_wait_cluster(&told, 0);
  my.out[my.t] = reinterpret_cast<const float*>(tile)[my.turned()] + 10.0f * given[my.t];
  ptx::cluster_sync();
}

// The block's own variable by its address in the cluster, and the other's.
__device__ void by_own_address(const BlockOfCluster& my) {
  __shared__ uint4 tile[32];
  if (my.t < 32) tile[my.t] = ptx::load_16(my.in + 4 * my.t);
  ptx::cluster_sync();
  if (my.t < 32) {
    const uint4* const turned = tile + (31 - my.t);
    ptx::store_16(my.out + 4 * my.t, ptx::load_cluster_16(ptx::map_to_block(turned, my.block)));
    const uint4 others = ptx::load_cluster_16(ptx::map_to_block(turned, my.other()));
    my.out[4 * my.t] += 100.0f * __uint_as_float(others.y);
  }
  ptx::cluster_sync();
}

// Numbers go to and fro.
__device__ void by_rounds(const BlockOfCluster& my) {
  __shared__ float ring[2][BlockOfCluster::kNumbers];
  float x = my.in[my.t];
  ptx::cluster_sync();
  for (int round = 0; round < 6; ++round) {
    const auto theirs = ptx::map_to_block(ring[round % 2], my.other());
    ptx::store_cluster_4(theirs + 4 * my.t, __float_as_uint(x));
    ptx::cluster_sync();
    x = 0.5f * x + ring[round % 2][my.turned()];
  }
  my.out[my.t] = x;
}

template <Way way>
__global__ void variables_of_clusters(const __grid_constant__ ptx::TensorMap from,
                                      const __grid_constant__ ptx::TensorMap to, const float* in, float* out) {
  const int block = ptx::block_in_cluster(), first = block * BlockOfCluster::kNumbers;
  const BlockOfCluster my{static_cast<int>(threadIdx.x), block, in + first, out + first};
  if constexpr (way == Way::copies) by_copies(my);
  if constexpr (way == Way::bulk_copies) by_bulk_copies(my);
  if constexpr (way == Way::bulk_stores) by_bulk_stores(my);
  if constexpr (way == Way::boxes) by_boxes(my, from, to);
  if constexpr (way == Way::matrices) by_matrices(my);
  if constexpr (way == Way::atomics) by_atomics(my);
  if constexpr (way == Way::messages) by_messages(my);
  if constexpr (way == Way::own_address) by_own_address(my);
  if constexpr (way == Way::rounds) by_rounds(my);
}

}  // namespace
}  // namespace llmengine
