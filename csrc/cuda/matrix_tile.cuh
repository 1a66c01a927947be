// Tiles of 16-bit matrices in shared memory, and their products on the tensor cores (mma.sync m16n8k16).
//
//   A tile's rows are chunks of 16 bytes. Chunk c of row r lies in place c ^ (r mod 8), so that neither the eight rows
//   that ldmatrix takes of one column of chunks, nor the chunks of one row, meet in a bank:
//
//        columns a multiple of 64             else of 32: rows begin in every other half of the banks,
//        row 0   0 1 2 3 4 5 6 7              c ^ (r / 2 mod 4)
//        row 1   1 0 3 2 5 4 7 6              else of 16: in each quarter of them by turns,
//        row 2   2 3 0 1 6 7 4 5              c ^ (r / 4 mod 2)
//
//   Accumulators are 16 x 8 blocks: of block (m, j), a thread holds rows 16 m + lane / 4 (elements 0 and 1) and 8 more
//   (2 and 3), columns 8 j + lane mod 4 x 2 and the next. Two such blocks side by side, rounded to 16 bits, are the
//   first operand of a product as they lie: no probability passes through memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/row.cuh"

namespace llmengine::cuda {

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x) / 32; }

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <class T, int rows_, int columns_>
struct Tile {
  static_assert(sizeof(T) == 2 && rows_ % 16 == 0 && columns_ % 16 == 0);
  static constexpr int rows = rows_, columns = columns_, chunks = columns / 8, bytes = rows * columns * 2;

  T* data;

  __device__ static Tile at(void* shared, int offset) {
    return {reinterpret_cast<T*>(static_cast<char*>(shared) + offset)};
  }

  __device__ __forceinline__ T* chunk(int row, int c) const { return chunk(row, 0, c); }
  // Chunk `even` + c, where the first is known at compile time and even, c is 0 or 1 past a multiple of 8 (of 4): what
  // differs between the chunks that a lane takes of its row is then a constant, and one register holds them all.
  __device__ __forceinline__ T* chunk(int row, int even, int c) const {
    constexpr int kShift = columns % 64 == 0 ? 0 : columns % 32 == 0 ? 1 : 2, kSwizzled = 8 >> kShift;
    const int turn = row >> kShift & (kSwizzled - 1), low = c % kSwizzled;  // kSwizzled chunks change places
    const int from = row * columns * 2 + (turn ^ low) * 16;
    const int offset = (from ^ even % kSwizzled * 16) + (even / kSwizzled + c / kSwizzled) * kSwizzled * 16;
    return reinterpret_cast<T*>(reinterpret_cast<char*>(data) + offset);
  }
  // As first operand: rows from `row`, a multiple of 16; the 16 columns from chunk c, a multiple of 2.
  __device__ __forceinline__ void load_first(uint32_t (&a)[4], int row, int c) const {
    ptx::load_matrix_x4(a, chunk(row + lane_of() % 16, c, lane_of() / 16));
  }
  // The same where its columns, from chunk `from` + c, are the operand's rows.
  __device__ __forceinline__ void load_first_of_columns(uint32_t (&a)[4], int row, int c, int from) const {
    ptx::load_matrix_x4_transposed(a, chunk(row + lane_of() % 8 + lane_of() / 16 * 8, c, from + lane_of() / 8 % 2));
  }
  // As second operands of two blocks side by side: its rows are their columns, or, the other way, it lies as they do.
  __device__ __forceinline__ void load_second_of_rows(uint32_t (&b)[4], int row, int c) const {
    ptx::load_matrix_x4(b, chunk(row + lane_of() % 8 + lane_of() / 16 * 8, c, lane_of() / 8 % 2));
  }
  __device__ __forceinline__ void load_second(uint32_t (&b)[4], int row, int c, int from = 0) const {
    ptx::load_matrix_x4_transposed(b, chunk(row + lane_of() % 16, c, from + lane_of() / 16));
  }
};

// Rows of a matrix in global memory: their place, and how far apart they begin.
template <class T>
struct Lines {
  T* data;
  int64_t stride;
  int columns;
  bool aligned;  // every row begins at a multiple of 16 bytes
};

// Copies `count` rows into a tile, zeros below and beside them; seen after wait_copies() and a barrier. A thread has
// one column of chunks and goes down by a fixed step, so that it keeps one address, not one a chunk.
template <int threads, class T, int rows, int columns>
__device__ __forceinline__ void copy_rows(const Tile<T, rows, columns>& to, const Lines<const T>& from, int count) {
  constexpr int kChunks = columns / 8, kStep = threads / kChunks, kSteps = (rows + kStep - 1) / kStep;
  const int first = static_cast<int>(threadIdx.x) / kChunks, c = static_cast<int>(threadIdx.x) % kChunks;
  if (threads % kChunks != 0 && first >= kStep) return;
  const T* at = from.data + first * from.stride + c * 8;
  const int64_t step = kStep * from.stride;
  if (from.aligned) {
    const int left = from.columns - c * 8, wide = 2 * (left < 0 ? 0 : left < 8 ? left : 8);
#pragma unroll
    for (int n = 0; n < kSteps; ++n, at += step) {
      const int row = first + n * kStep, bytes = row < count ? wide : 0;
      if (rows % kStep == 0 || row < rows) ptx::copy_async_16(to.chunk(row, c), at, bytes);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < rows; row += kStep, at += step) {
      uint4 vector = make_uint4(0, 0, 0, 0);
      if (row < count) vector = load_vector(at - c * 8, c * 8, from.columns, false);
      *reinterpret_cast<uint4*>(to.chunk(row, c)) = vector;
    }
  }
}

// ---- accumulators ---------------------------------------------------------------------------------------------------

template <int blocks, int columns>
using Sums = float[blocks][columns / 8][4];

template <int blocks, int n>
__device__ __forceinline__ void clear(float (&x)[blocks][n][4]) {
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][j][i] = 0.0f;
}

template <int blocks, int n>
__device__ __forceinline__ void copy(const float (&from)[blocks][n][4], float (&to)[blocks][n][4]) {
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[m][j][i] = from[m][j][i];
}

// body(element, row, column) for each element that this thread holds.
template <int blocks, int n, class Body>
__device__ __forceinline__ void each(float (&x)[blocks][n][4], const Body& body) {
  const int row = lane_of() / 4, column = lane_of() % 4 * 2;
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(x[m][j][i], 16 * m + row + i / 2 * 8, 8 * j + column + i % 2);
}

// Rounded to 16 bits, as first operands of products over their columns.
template <class T, int blocks, int n>
__device__ __forceinline__ void round_to_operands(const float (&x)[blocks][n][4], uint32_t (&a)[blocks][n / 2][4]) {
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][j / 2][j % 2 * 2 + half] = pair_of<T>(x[m][j][2 * half], x[m][j][2 * half + 1]);
}

// ---- products -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  ptx::mma_16x8x16_bf16(c, a, b);
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  ptx::mma_16x8x16_f16(c, a, b);
}

// Two blocks side by side.
template <class T>
__device__ __forceinline__ void multiply_add_two(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[4]) {
  const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
  multiply_add(left, a, b_left, T{});
  multiply_add(right, a, b_right, T{});
}

// c = a b^T, a being `blocks` x 16 rows from `row` of its tile.
template <int blocks, class T, int a_rows, int b_rows, int columns>
__device__ __forceinline__ void product_of_rows(Sums<blocks, b_rows>& c, const Tile<T, a_rows, columns>& a, int row,
                                                const Tile<T, b_rows, columns>& b) {
  clear(c);
#pragma unroll
  for (int k = 0; k < columns / 16; ++k) {
    uint32_t first[blocks][4];
#pragma unroll
    for (int m = 0; m < blocks; ++m) a.load_first(first[m], row + 16 * m, 2 * k);
#pragma unroll
    for (int j = 0; j < b_rows / 16; ++j) {
      uint32_t second[4];
      b.load_second_of_rows(second, 16 * j, 2 * k);
#pragma unroll
      for (int m = 0; m < blocks; ++m) multiply_add_two<T>(c[m][2 * j], c[m][2 * j + 1], first[m], second);
    }
  }
}

// c += a b, a in registers.
template <int blocks, class T, int b_rows, int columns>
__device__ __forceinline__ void add_product(Sums<blocks, columns>& c, const uint32_t (&a)[blocks][b_rows / 16][4],
                                            const Tile<T, b_rows, columns>& b) {
#pragma unroll
  for (int k = 0; k < b_rows / 16; ++k)
#pragma unroll
    for (int j = 0; j < columns / 16; ++j) {
      uint32_t second[4];
      b.load_second(second, 16 * k, 2 * j);
#pragma unroll
      for (int m = 0; m < blocks; ++m) multiply_add_two<T>(c[m][2 * j], c[m][2 * j + 1], a[m][k], second);
    }
}

// ---- stores ---------------------------------------------------------------------------------------------------------

// Stores a warp's accumulators, times what multiplier(m, half) says of their rows, as `count` rows. They pass through
// the rows from `row` of a tile, which no other warp uses, so that 16 bytes are stored at a time.
template <class T, int blocks, int rows, int columns, class Multiplier>
__device__ __forceinline__ void store_rows(const Sums<blocks, columns>& x, const Multiplier& multiplier,
                                           const Tile<T, rows, columns>& through, int row, const Lines<T>& to,
                                           int count) {
  __syncwarp();  // what lay there has been read
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float by = multiplier(m, half);
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        T* pair = through.chunk(row + 16 * m + 8 * half + lane_of() / 4, j) + lane_of() % 4 * 2;
        *reinterpret_cast<uint32_t*>(pair) = pair_of<T>(x[m][j][2 * half] * by, x[m][j][2 * half + 1] * by);
      }
    }
  __syncwarp();
#pragma unroll 1
  for (int i = lane_of(); i < blocks * 16 * (columns / 8); i += 32) {
    const int line = i / (columns / 8), c = i % (columns / 8);
    if (line >= count) break;
    const uint4 vector = *reinterpret_cast<const uint4*>(through.chunk(row + line, c));
    store_vector(to.data + line * to.stride, c * 8, to.columns, to.aligned, vector);
  }
}

// Zeros as `count` rows, a tile's, by the whole block.
template <int threads, class T>
__device__ __forceinline__ void zero_rows(const Lines<T>& to, int count) {
  const int chunks = (to.columns + 7) / 8;
  for (int i = static_cast<int>(threadIdx.x); i < count * chunks; i += threads) {
    store_vector(to.data + i / chunks * to.stride, i % chunks * 8, to.columns, to.aligned, make_uint4(0, 0, 0, 0));
  }
}

}  // namespace llmengine::cuda
