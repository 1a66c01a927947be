// The product that kernels with matrices share on Hopper: c = a b over a depth k, in float32 sums of bf16 or fp16
// operands.
//
//     block 0 of a cluster         block 1        Two blocks run together, one below the other: their columns of b are
//   +---------------------+                       the same, so each fetches half of them and sends it to both. A block
//   |  64 x n   warpgroup 1|   the same, of        owns 128 x n of c (n 256 or 128) in registers, a warpgroup 64 x n of
//   +---------------------+   the 128 rows         them (n / 2 a thread). Warpgroup 0 has one thread at work, which
//   |  64 x n   warpgroup 2|   below               keeps a ring of stages full, 64 of k each; what it needs not of
//   +---------------------+                       registers the others take.
//
//   full[s]    a stage's bytes have come: wait for it, multiply (four products of 16 of k), keep one group in flight
//   empty[s]   both warpgroups of both blocks have multiplied what was in the stage: it is fetched into again
//
//   Blocks are persistent: each takes tile after tile, and the ring goes on through them, so that a tile's first stages
//   come while the last one's sums are stored. Those go by panels of 64 columns through shared memory: two panels a
//   warpgroup, stored by the asynchronous unit. What lies past an edge is zeros on the way in and left out on the way
//   out, so no thread compares.
//
//   An operand lies `along` k (its lines are rows of k) or `across` it (a row for each k): a stage holds lines of 64 k,
//   or panels of 64 lines with a row for each k; both are 128 bytes a row, swizzled, and wgmma reads either.
//
//   flops   2 m n k
//   bytes   a stage of 128 x n: (128 + n / 2) 64 2 from the second-level cache, for 2 128 n 64 flops: 128 flops a byte
//           at n = 256. Shared memory is read by wgmma: 64 x 16 and 16 x n for 64 x n x 16.
//   limit   the tensor cores: 4096 dense flops of bf16 a clock and multiprocessor
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace llmengine::cuda::gemm_sm90a {

inline constexpr int kCluster = 2, kWarpgroups = 2;  // blocks of a cluster; warpgroups of a block that multiply
inline constexpr int kThreads = 128 * (1 + kWarpgroups);
inline constexpr int kRows = 64 * kWarpgroups;       // of a block's tile
inline constexpr int kDepth = 64, kPerProduct = 16;  // of k, in a stage and in a product
inline constexpr int kStages = 4;
inline constexpr int kPanel = 64;                               // columns that are 128 bytes of a row
inline constexpr int kGroup = 8;                                // rows of clusters' tiles that run side by side
inline constexpr int kFewRegisters = 40, kManyRegisters = 232;  // 128 x 40 + 256 x 232: all that 384 threads have

template <int columns>
struct Shared {
  uint16_t a[kStages][kRows * kDepth];
  uint16_t b[kStages][columns * kDepth];
  uint16_t c[kWarpgroups][2][64 * kPanel];
  ptx::Mbarrier full[kStages], empty[kStages];

  static constexpr int kStageBytes = (kRows + columns) * kDepth * 2;
};

// Which tiles there are: clusters' rows of 2 x 128, columns of n.
struct Tiles {
  int rows, columns, steps;  // steps of k

  struct Place {
    int row, column;
  };
  // They run down kGroup rows, then to the next column: clusters that run at once share operands in the cache.
  __device__ __forceinline__ Place place(int tile) const {
    const int group = tile / (kGroup * columns), first = group * kGroup;
    const int height = rows - first < kGroup ? rows - first : kGroup, within = tile - group * kGroup * columns;
    return {first + within % height, within / height};
  }
  __device__ __forceinline__ int count() const { return rows * columns; }
};

// Where a thread is in the ring of stages.
struct Turn {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ int cluster_of_block() { return static_cast<int>(blockIdx.x) / kCluster; }
__device__ __forceinline__ int clusters() { return static_cast<int>(gridDim.x) / kCluster; }

// ---- the thread that fetches ----------------------------------------------------------------------------------------

// Lines [first, first + lines) at `k` of depth, into a stage that begins with line 0; `blocks` 0: for this block.
template <bool across>
__device__ __forceinline__ void fetch(uint16_t* to, const ptx::TensorMap& map, ptx::Mbarrier* full, int first, int k,
                                      int lines, uint16_t blocks) {
  const auto copy = [&](uint16_t* place, int x, int y) {
    if (blocks == 0) {
      ptx::copy_tensor(place, &map, full, x, y);
    } else {
      ptx::copy_tensor_multicast(place, &map, full, blocks, x, y);
    }
  };
  if constexpr (across) {
    for (int l = 0; l < lines; l += kPanel) copy(to + l * kDepth, first + l, k);
  } else {
    copy(to, k, first);
  }
}

template <int columns, bool a_across, bool b_across>
__device__ __forceinline__ void fetch_all(Shared<columns>& shared, const ptx::TensorMap& a, const ptx::TensorMap& b,
                                          const Tiles& tiles) {
  constexpr int kShare = columns / kCluster;  // of b's lines, that this block fetches for all
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  const int block = ptx::block_in_cluster();
  Turn turn;
  for (int tile = cluster_of_block(); tile < tiles.count(); tile += clusters()) {
    const auto [row, column] = tiles.place(tile);
    for (int step = 0; step < tiles.steps; ++step, turn.next()) {
      const int s = turn.stage, k = step * kDepth;
      ptx::mbarrier_wait_cluster(&shared.empty[s], turn.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(&shared.full[s], Shared<columns>::kStageBytes);
      fetch<a_across>(shared.a[s], a, &shared.full[s], (row * kCluster + block) * kRows, k, kRows, 0);
      fetch<b_across>(shared.b[s] + block * kShare * kDepth, b, &shared.full[s], column * columns + block * kShare, k,
                      kShare, kAll);
    }
  }
}

// ---- the warpgroups that multiply -----------------------------------------------------------------------------------

template <class T>
inline constexpr auto kMultiplicand = ptx::Multiplicand::bf16;
template <>
inline constexpr auto kMultiplicand<f16> = ptx::Multiplicand::f16;

template <bool across>
inline constexpr auto kMajor = across ? ptx::Major::mn : ptx::Major::k;

// From eight rows to the next, and from panel to panel of lines that lie across k.
inline constexpr int kEightRows = 8 * 128, kPanelBytes = kDepth * 128;
// From one product's part of k to the next one's.
template <bool across>
inline constexpr int kAdvance = across ? kPerProduct * 128 : kPerProduct * 2;

template <class T, bool a_across, bool b_across, int count>
__device__ __forceinline__ void multiply_stage(float (&d)[count], const uint16_t* a, const uint16_t* b, bool add) {
  const auto left = ptx::matrix_descriptor(a, kPanelBytes, kEightRows, Swizzle::bytes_128);
  const auto right = ptx::matrix_descriptor(b, kPanelBytes, kEightRows, Swizzle::bytes_128);
#pragma unroll
  for (int part = 0; part < kDepth / kPerProduct; ++part) {
    ptx::wgmma<kMultiplicand<T>, kMajor<a_across>, kMajor<b_across>>(
        d, left.advanced(part * kAdvance<a_across>), right.advanced(part * kAdvance<b_across>), add || part > 0);
  }
}

// One thread a warpgroup, to the fetching threads of all blocks.
__device__ __forceinline__ void give_back(ptx::Mbarrier* empty) {
  if (threadIdx.x % 128 != 0) return;
  for (int block = 0; block < kCluster; ++block) ptx::mbarrier_arrive_cluster(ptx::map_to_block(empty, block));
}

template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return kMultiplicand<T> == ptx::Multiplicand::bf16 ? ptx::bf16x2_of(low, high) : ptx::f16x2_of(low, high);
}

// A warpgroup's 64 x n sums, panel by panel, from `row` and `column` of c on.
template <class T, int count>
__device__ __forceinline__ void store_sums(const float (&d)[count], uint16_t (&panels)[2][64 * kPanel],
                                           const ptx::TensorMap& out, int row, int column) {
  const int t = static_cast<int>(threadIdx.x) % 128, lane = t % 32, group = static_cast<int>(threadIdx.x) / 128;
  const int line = t / 32 * 16 + lane % 16;  // that this lane names to stmatrix
#pragma unroll
  for (int p = 0; p < count * 2 / kPanel; ++p) {
    if (t == 0) ptx::wait_store_reads<1>();
    ptx::barrier_sync(group, 128);
    uint16_t* panel = panels[p % 2];
#pragma unroll
    for (int c = 0; c < kPanel / 8; c += 2) {
      const float* sums = d + p * (kPanel / 2) + 4 * c;
      const uint32_t r[4] = {pair_of<T>(sums[0], sums[1]), pair_of<T>(sums[2], sums[3]), pair_of<T>(sums[4], sums[5]),
                             pair_of<T>(sums[6], sums[7])};
      ptx::store_matrix_x4(panel + line * kPanel + ((c + lane / 16) ^ line % 8) * 8, r);
    }
    ptx::fence_async_shared();
    ptx::barrier_sync(group, 128);
    if (t == 0) {
      ptx::store_tensor(&out, panel, column + p * kPanel, row);
      ptx::commit_stores();
    }
  }
}

template <class T, int columns, bool a_across, bool b_across>
__device__ __forceinline__ void multiply_all(Shared<columns>& shared, const ptx::TensorMap& out, const Tiles& tiles) {
  const int group = static_cast<int>(threadIdx.x) / 128 - 1, block = ptx::block_in_cluster();
  float d[columns / 2];
  Turn turn;
  for (int tile = cluster_of_block(); tile < tiles.count(); tile += clusters()) {
    int before = 0;  // the stage whose products may be under way
    for (int step = 0; step < tiles.steps; ++step, turn.next()) {
      const int s = turn.stage;
      ptx::mbarrier_wait(&shared.full[s], turn.parity);
      ptx::wgmma_fence();
      multiply_stage<T, a_across, b_across>(d, shared.a[s] + group * 64 * kDepth, shared.b[s], step > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (step > 0) give_back(&shared.empty[before]);
      before = s;
    }
    ptx::wgmma_wait<0>(d);
    give_back(&shared.empty[before]);
    const auto [row, column] = tiles.place(tile);
    store_sums<T>(d, shared.c[group], out, (row * kCluster + block) * kRows + group * 64, column * columns);
  }
  if (threadIdx.x % 128 == 0) ptx::wait_store_reads<0>();
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class T, int columns, bool a_across, bool b_across>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90a(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b,
               const __grid_constant__ ptx::TensorMap out, Tiles tiles) {
  auto& shared = *static_cast<Shared<columns>*>(ptx::dynamic_shared_1024());
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&shared.full[s], 1);
      ptx::mbarrier_init(&shared.empty[s], kWarpgroups * kCluster);
    }
    ptx::mbarrier_init_fence();
  }
  ptx::cluster_sync();
  if (warp < 4) {
    ptx::decrease_registers<kFewRegisters>();
    if (warp == 0 && ptx::elect_one()) {
      for (const auto* map : {&a, &b, &out}) ptx::prefetch_tensor_map(map);
      fetch_all<columns, a_across, b_across>(shared, a, b, tiles);
    }
  } else {
    ptx::increase_registers<kManyRegisters>();
    multiply_all<T, columns, a_across, b_across>(shared, out, tiles);
  }
  ptx::cluster_sync();  // no block ends while the other arrives at its mbarriers
}

}  // namespace llmengine::cuda::gemm_sm90a
