// What kernels on Hopper share: rings of tiles in shared memory, which TMA fills and products of warpgroups read
// (ptx/tensor_copy.cuh, ptx/wgmma.cuh).
//
//   A tile is panels of 64 columns, side by side; a row of a panel is 128 bytes, swizzled as its box came. Either
//   operand may be read along its rows ("k-major") or across them ("mn-major"), eight rows, a pattern, at a time.
//
//   Blocks are 384 threads: warpgroup 0 has one warp at work, which fetches; what it needs not of registers the two
//   warpgroups that multiply take over.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/matrix_tile.cuh"
#include "cuda/ptx/made_here.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace llmengine::cuda {

inline constexpr int kPanel = 64;      // columns that are 128 bytes of a row, and a box
inline constexpr int kGroupRows = 64;  // of a warpgroup
inline constexpr int kEightRows = 8 * 128;
inline constexpr int kFewRegisters = 40, kManyRegisters = 232;  // 128 x 40 + 256 x 232: all that 384 threads have

template <class T>
inline constexpr auto kMultiplicand = ptx::Multiplicand::bf16;
template <>
inline constexpr auto kMultiplicand<f16> = ptx::Multiplicand::f16;

// Where a thread is in a ring: what it has gone through so far.
template <int stages>
struct Turn {
  static_assert((stages & (stages - 1)) == 0);
  unsigned number = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(number % stages); }
  __device__ __forceinline__ int parity() const { return static_cast<int>(number / stages % 2); }
};

// One thread a warpgroup: what its products have read.
__device__ __forceinline__ void give_back(ptx::Mbarrier* free) {
  if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(free);
}

// One thread a warp: what its threads have read.
__device__ __forceinline__ void give_back_by_warps(ptx::Mbarrier* free) {
  __syncwarp();
  if (lane_of() == 0) ptx::mbarrier_arrive(free);
}

// A warp's 16 rows as the accumulators of its warpgroup's products.
template <int n>
__device__ __forceinline__ float (&flat(float (&x)[1][n][4]))[4 * n] {
  return reinterpret_cast<float (&)[4 * n]>(x);
}

// x = left right^T, begun: 64 rows of left, 8 n of right, D columns each.
template <class T, int D, int n>
__device__ __forceinline__ void begin_product_of_rows(float (&x)[1][n][4], const uint16_t* left,
                                                      const uint16_t* right) {
  const auto a = ptx::matrix_descriptor(left, 0, kEightRows, Swizzle::bytes_128);
  const ptx::MatrixDescriptor here{ptx::made_here(a.bits)};
  const auto b = ptx::matrix_descriptor(right, 0, kEightRows, Swizzle::bytes_128);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int panel = k / 4, within = k % 4 * 32;
    ptx::wgmma<kMultiplicand<T>>(flat(x), here.advanced(panel * kGroupRows * 128 + within),
                                 b.advanced(panel * 8 * n * 128 + within), k > 0);
  }
  ptx::wgmma_commit();
}

// x += left right, begun: left is 64 x 16 steps, in registers, right as many rows of D columns.
template <class T, int D, int steps>
__device__ __forceinline__ void begin_adding_product(Sums<1, D>& x, const uint32_t (&left)[1][steps][4],
                                                     const uint16_t* right) {
  const auto b = ptx::matrix_descriptor(right, steps * 16 * 128, kEightRows, Swizzle::bytes_128);
#pragma unroll
  for (int k = 0; k < steps; ++k)
    ptx::wgmma<kMultiplicand<T>, ptx::Major::mn>(flat(x), left[0][k], b.advanced(k * 16 * 128), true);
  ptx::wgmma_commit();
}

}  // namespace llmengine::cuda
