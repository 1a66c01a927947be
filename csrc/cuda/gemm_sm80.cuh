// The product that kernels with matrices share, on every GPU from sm_80 on: c = a b^T over a depth k, in float32 sums
// of bf16 or fp16 operands, and an epilogue of the kernel's own (gemm_sm80.cu, ffn_sm80.cu,
// linear_cross_entropy_sm80.cu).
//
//                        b: 128 lines              A block of four warps owns 128 x 128 of c, a warp 64 x 64 of them in
//                 k ->  +-------------+            registers (128 a thread). 32 of k at a time, `kStages` of them,
//               stream  |             |            through shared memory by cp.async: two are on their way while the
//         a: 128  +-+-+-+-------------+            third is multiplied, with one barrier each. 48 KiB and at most 255
//         lines   | | | |  w0  |  w1  |            registers, so that two blocks share a multiprocessor: one multiplies
//                 | | | |------+------|            while the other begins or ends.
//                 | | | |  w2  |  w3  |
//                 +-+-+-+-------------+            Tiles run down 8 rows of tiles, then to the next column (place_of):
//                 0 1 2 0 1 ..  stages             blocks that run at once share operands in the second-level cache.
//
//   An operand lies `along` k (rows of k, as inputs and weights of y = x w^T) or `across` it (a row for each k, as both
//   operands of w's gradient): ldmatrix turns the second kind while it reads. Rows may begin anywhere; those that do
//   not begin at 16 bytes are read element by element. Lines and k that do not fill a tile are zeros.
//
//   flops   2 m n k, by mma.sync m16n8k16
//   bytes   (m + n) 2 k a tile of m x n = 128 x 128, mostly from the second-level cache: 64 flops a byte. From shared
//           memory a warp reads 4 KiB for 64 x 64 x 16: 1/32 byte a flop, that is 4096 flops a clock at 128 bytes
//   limit   the tensor cores: those of an A100 do 2048 flops a clock. From sm_90 on mma.sync reaches a part of what
//           wgmma does.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/matrix_tile.cuh"
#include "cuda/reduce.cuh"

namespace llmengine::cuda::gemm {

inline constexpr int kWarps = 4, kThreads = 32 * kWarps;
inline constexpr int kTile = 128, kWarpTile = 64;  // rows, and columns, of a block's and of a warp's part of c
inline constexpr int kDepth = 32, kStages = 3;
inline constexpr int kGroup = 8;  // rows of tiles that run side by side

using Accumulators = Sums<kWarpTile / 16, kWarpTile>;

// ---- place ----------------------------------------------------------------------------------------------------------

struct Place {
  int row, column;  // of tiles
};

__device__ __forceinline__ Place place_of(int block, int rows, int columns) {
  const int group = block / (kGroup * columns), first = group * kGroup;
  const int height = rows - first < kGroup ? rows - first : kGroup, within = block - group * kGroup * columns;
  return {first + within % height, within / height};
}

// This warp's first row and column in the block's tile.
__device__ __forceinline__ int warp_row() { return warp_of() / 2 * kWarpTile; }
__device__ __forceinline__ int warp_column() { return warp_of() % 2 * kWarpTile; }

// ---- operands -------------------------------------------------------------------------------------------------------

// One of a product's two matrices: `lines` rows, or columns, of c.
template <class T, bool across_>
struct Operand {
  static constexpr bool across = across_;
  using Stage = std::conditional_t<across, Tile<T, kDepth, kTile>, Tile<T, kTile, kDepth>>;

  const T* data;
  int64_t stride;
  int lines;
  bool aligned;

  // Begins the copy of the tile of lines from `first` on, at k of `depth`.
  __device__ __forceinline__ void copy(const Stage& to, int first, int k, int depth) const {
    if constexpr (across) {
      copy_rows<kThreads>(to, Lines<const T>{data + k * stride + first, stride, lines - first, aligned}, depth - k);
    } else {
      copy_rows<kThreads>(to, Lines<const T>{data + first * stride + k, stride, depth - k, aligned}, lines - first);
    }
  }
};

// Two second operands along k at once, for a gate: a tile has 64 lines of each, and a warp 32 columns of c of `left`
// and then those of `right`.
template <class T>
struct Pair {
  static constexpr bool across = false;
  using Stage = Tile<T, kTile, kDepth>;

  Operand<T, false> left, right;

  __device__ __forceinline__ void copy(const Stage& to, int first, int k, int depth) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const auto& from = n % 2 == 0 ? left : right;
      const int line = first / 2 + n / 2 * 32;
      copy_rows<kThreads>(Tile<T, 32, kDepth>{to.data + n * 32 * kDepth},
                          Lines<const T>{from.data + line * from.stride + k, from.stride, depth - k, from.aligned},
                          from.lines - line);
    }
  }
};

template <class A, class B>
struct Stages {
  static constexpr int bytes_of_one = A::Stage::bytes + B::Stage::bytes, bytes = kStages * bytes_of_one;

  void* shared;

  __device__ typename A::Stage a(int stage) const { return A::Stage::at(shared, stage * bytes_of_one); }
  __device__ typename B::Stage b(int stage) const {
    return B::Stage::at(shared, stage * bytes_of_one + A::Stage::bytes);
  }
};
inline constexpr int kSharedBytes = kStages * 2 * kTile * kDepth * 2;

// ---- the product ----------------------------------------------------------------------------------------------------

template <class T, int rows, int columns>
__device__ __forceinline__ void load_a(uint32_t (&a)[kWarpTile / 16][4], const Tile<T, rows, columns>& tile, int k) {
#pragma unroll
  for (int m = 0; m < kWarpTile / 16; ++m) {
    if constexpr (rows == kDepth) {
      tile.load_first_of_columns(a[m], 16 * k, 2 * m, warp_row() / 8);
    } else {
      tile.load_first(a[m], warp_row() + 16 * m, 2 * k);
    }
  }
}

template <class T, int rows, int columns>
__device__ __forceinline__ void load_b(uint32_t (&b)[kWarpTile / 16][4], const Tile<T, rows, columns>& tile, int k) {
#pragma unroll
  for (int j = 0; j < kWarpTile / 16; ++j) {
    if constexpr (rows == kDepth) {
      tile.load_second(b[j], 16 * k, 2 * j, warp_column() / 8);
    } else {
      tile.load_second_of_rows(b[j], warp_column() + 16 * j, 2 * k);
    }
  }
}

// c += this warp's part of one stage.
template <class T, class TileA, class TileB>
__device__ __forceinline__ void multiply_stage(Accumulators& c, const TileA& tile_a, const TileB& tile_b) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[kWarpTile / 16][4], b[kWarpTile / 16][4];
    load_a(a, tile_a, k);
    load_b(b, tile_b, k);
#pragma unroll
    for (int j = 0; j < kWarpTile / 16; ++j)
#pragma unroll
      for (int m = 0; m < kWarpTile / 16; ++m) multiply_add_two<T>(c[m][2 * j], c[m][2 * j + 1], a[m], b[j]);
  }
}

// c += a b^T over k in [from, to), whole steps but for the last, of the tile that begins at line `row` of a and
// `column` of b. Whoever uses the stages' memory afterwards begins with a barrier: other warps may still multiply.
template <class T, class A, class B>
__device__ __forceinline__ void multiply_add(Accumulators& c, void* shared, const A& a, const B& b, int row, int column,
                                             int from, int to) {
  const Stages<A, B> stages{shared};
  const int steps = (to - from + kDepth - 1) / kDepth;
  const auto begin = [&](int step, int stage) {
    if (step < steps) {
      a.copy(stages.a(stage), row, from + step * kDepth, to);
      b.copy(stages.b(stage), column, from + step * kDepth, to);
    }
    ptx::commit_copies();  // of nothing, at the end: so the groups that are waited for are always the latest
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) begin(stage, stage);
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();  // the stage is there, and every warp is done with the one before it
    begin(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    multiply_stage<T>(c, stages.a(stage), stages.b(stage));
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

// ---- epilogues ------------------------------------------------------------------------------------------------------

// Accumulators go to an epilogue as vectors of eight columns of a row, by way of the stages' memory: a warp has room
// for 32 of its rows there. Of a row's chunks of four floats the even ones come first, then, 16 bytes on, the odd ones,
// and rows are 8 banks apart: neither the pairs that a thread writes nor the chunks that it reads meet in a bank.
struct Panel {
  static constexpr int rows = 32, odd = kWarpTile / 2 + 4, stride = 2 * odd;

  float* data;

  __device__ explicit Panel(void* shared) : data(static_cast<float*>(shared) + warp_of() * rows * stride) {}

  __device__ __forceinline__ float* pair(int row, int column) const {
    return data + row * stride + column / 4 % 2 * odd + column / 8 * 4 + column % 4;
  }
  __device__ __forceinline__ void load(int row, int vector, float (&x)[8]) const {
    const float* chunk = data + row * stride + vector * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four = *reinterpret_cast<const float4*>(chunk + half * odd);
      x[4 * half] = four.x, x[4 * half + 1] = four.y, x[4 * half + 2] = four.z, x[4 * half + 3] = four.w;
    }
  }
};
inline constexpr int kPanelBytes = kWarps * Panel::rows * Panel::stride * 4;
static_assert(kPanelBytes <= kSharedBytes);

// body(row, column, x) for each vector, x[0] being eight columns from `column` on of `row`, both counted in the tile.
// sides = 2: of a Pair, x[0] of its left and x[1] of its right operand. A thread's vectors have one column. What an
// epilogue reads from global memory it gives as load(row, column): that of `batch` vectors is under way at once, and
// comes back as the body's last argument.
template <int sides, int batch, class Load, class Body>
__device__ __forceinline__ void each_vector(Accumulators& c, void* shared, const Load& load, const Body& body) {
  constexpr int kVectors = kWarpTile / 8 / sides, kAtOnce = 32 / kVectors;
  static_assert(Panel::rows % (batch * kAtOnce) == 0);
  const Panel panel(shared);
  const int lane = lane_of(), vector = lane % kVectors, column = warp_column() / sides + vector * 8;
  __syncthreads();  // every warp is done with the stages
#pragma unroll 1
  for (int first = 0; first < kWarpTile; first += Panel::rows) {
    __syncwarp();  // what lay there has been read
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < kWarpTile / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* pair = panel.pair(16 * m + 8 * half + lane / 4, 8 * j + lane % 4 * 2);
          *reinterpret_cast<uint2*>(pair) =
              make_uint2(__float_as_uint(c[m][j][2 * half]), __float_as_uint(c[m][j][2 * half + 1]));
        }
    __syncwarp();
#pragma unroll 1
    for (int row = lane / kVectors; row < Panel::rows; row += batch * kAtOnce) {
      decltype(load(0, 0)) loaded[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) loaded[i] = load(warp_row() + first + row + i * kAtOnce, column);
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        float x[sides][8];
#pragma unroll
        for (int side = 0; side < sides; ++side) panel.load(row + i * kAtOnce, vector + side * kVectors, x[side]);
        body(warp_row() + first + row + i * kAtOnce, column, x, loaded[i]);
      }
    }
    // the other half, so that the epilogue is there once
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < kWarpTile / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][j][i] = c[m + 2][j][i];
  }
}

template <int sides, class Body>
__device__ __forceinline__ void each_vector(Accumulators& c, void* shared, const Body& body) {
  struct Nothing {};
  each_vector<sides, 1>(
      c, shared, [](int, int) { return Nothing{}; },
      [&](int row, int column, float (&x)[sides][8], Nothing) { body(row, column, x); });
}

// The sums over a warp's rows, of which each thread has those that it saw of its vector: eight columns of a line that
// begin at the tile's, at `column`. After each_vector<1>.
__device__ __forceinline__ void store_column_sums(float (&sums)[8], float* line, int column, int columns,
                                                  bool aligned) {
#pragma unroll
  for (int lanes = 8; lanes < 32; lanes *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], lanes);
  }
  if (lane_of() < 8) store_floats(line, column + warp_column() + lane_of() * 8, columns, aligned, sums);
}

}  // namespace llmengine::cuda::gemm
