// Sums over the threads that share a row: within a warp by shuffles, across warps through shared memory.
#pragma once

#include <cuda_runtime.h>

namespace llmengine::cuda {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

template <int n>
__device__ __forceinline__ void warp_sum(float (&x)[n]) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += __shfl_xor_sync(kWholeWarp, x[i], lanes);
  }
}

// Room for n sums of each warp of a row. There are two: a warp that is ahead writes the next sums while a slow one
// still reads these, and one barrier a sum is enough, since nobody gets two barriers ahead.
template <int n, int max_warps>
struct RowSlots {
  float sums[2][max_warps][n];
};

// n sums over the blockDim.x threads of a row, in every one of them, in a fixed order. With more than one warp to a
// row, the row is the block's only one.
template <int n, int max_warps>
__device__ __forceinline__ void row_sum(float (&x)[n], RowSlots<n, max_warps>& slots, int& turn) {
  warp_sum(x);
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warps == 1) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  auto& room = slots.sums[turn];
  turn ^= 1;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) room[warp][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = lane < warps ? room[lane][i] : 0.0f;
  warp_sum(x);
}

}  // namespace llmengine::cuda
