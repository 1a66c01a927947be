// Sums and maxima over the threads that share a row: within a warp by shuffles, across warps through shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace llmengine::cuda {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

struct Sum {
  static constexpr float kNeutral = 0.0f;
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  static constexpr float kNeutral = -INFINITY;
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <int n>
__device__ __forceinline__ float largest_of(const float (&x)[n]) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < n; ++i) largest = fmaxf(largest, x[i]);
  return largest;
}

template <class Op, class V, int n>
__device__ __forceinline__ void warp_reduce(V (&x)[n]) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = Op{}(x[i], __shfl_xor_sync(kWholeWarp, x[i], lanes));
  }
}

// Room for n results of each warp of a row. There are two: a warp that is ahead writes the next while a slow one still
// reads these, and one barrier a reduction is enough, since nobody gets two barriers ahead.
template <int n, int max_warps, class V = float>
struct RowSlots {
  V results[2][max_warps][n];
};

// n reductions over the blockDim.x threads of a row, in every one of them, in a fixed order. With more than one warp to
// a row, the row is the block's only one. `turn` goes from one reduction of a kernel to the next.
template <class Op, class V, int n, int max_warps>
__device__ __forceinline__ void row_reduce(V (&x)[n], RowSlots<n, max_warps, V>& slots, int& turn) {
  warp_reduce<Op>(x);
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warps == 1) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  auto& room = slots.results[turn];
  turn ^= 1;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) room[warp][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = lane < warps ? room[lane][i] : V{Op::kNeutral};
  warp_reduce<Op>(x);
}

}  // namespace llmengine::cuda
