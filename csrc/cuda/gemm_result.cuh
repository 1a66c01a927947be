// Where a product's sums go (gemm.h): bias and `added` join them on the way, or, where k is cut into parts, nothing
// yet.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/gemm.h"
#include "cuda/row.cuh"

namespace llmengine::cuda {

inline constexpr int kAddedAhead = 4;  // vectors of `added` that a thread asks for at once

template <class T>
struct Result {
  int rows, columns;
  Line bias;
  Rows<const T> added;  // one of the two, or none
  Rows<const float> added_wide;
  Rows<T> out;  // one of the two
  Rows<float> out_wide;
  int64_t part_stride;  // from one part's sums to the next one's
  Rows<uint8_t> low;    // sums of several products, in `out` and here (gemm.h)
  bool goes_on, ends;

  // A vector of `added` as it lies in memory: an epilogue asks for several before it uses the first.
  struct Added {
    uint4 low, high;
  };

  __device__ __forceinline__ Added load(int row, int column) const {
    Added x{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    if (row >= rows) return x;
    if (added.data) {
      x.low = load_vector(added[row], column, columns, added.aligned);
    } else if (goes_on) {
      x.low = load_vector(static_cast<const T*>(out[row]), column, columns, out.aligned);
      x.high = load_low(row, column);
    } else if (added_wide.data) {
      x.low = load_vector(added_wide[row], column, columns, added_wide.aligned);
      x.high = load_vector(added_wide[row], column + 4, columns, added_wide.aligned);
    }
    return x;
  }

  __device__ __forceinline__ void store(int row, int column, int part, float (&x)[8], const Added& more) const {
    if (row >= rows) return;
    add_line<T>(bias, column, columns, x);
    if (added.data) {
      float y[8];
      unpack<T>(more.low, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += y[i];
    } else if (goes_on) {
      add_sums(more, x);
    } else if (added_wide.data) {
      float low[4], high[4];
      unpack<float>(more.low, low);
      unpack<float>(more.high, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] += low[i], x[4 + i] += high[i];
    }
    if (!ends) {
      store_sums(row, column, x);
    } else if (out.data) {
      store_vector(out[row], column, columns, out.aligned, pack<T>(x));
    } else {
      store_floats(out_wide[row] + part * part_stride, column, columns, out_wide.aligned, x);
    }
  }

  // ---- sums of several products: eight bytes beside a vector of 16 bits ----

  __device__ __forceinline__ uint4 load_low(int row, int column) const {
    uint32_t words[2] = {};
    if (low.aligned && column + 8 <= columns) {
      const uint2 both = ptx::load_8(low[row] + column);
      words[0] = both.x, words[1] = both.y;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i < columns) words[i / 4] |= uint32_t{low[row][column + i]} << i % 4 * 8;
      }
    }
    return make_uint4(words[0], words[1], 0, 0);
  }

  __device__ __forceinline__ void add_sums(const Added& held, float (&x)[8]) const {
    const uint32_t upper[4] = {held.low.x, held.low.y, held.low.z, held.low.w}, lower[2] = {held.high.x, held.high.y};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t half = upper[i / 2] >> i % 2 * 16, byte = lower[i / 4] >> i % 4 * 8 & 0xff;
      x[i] += __uint_as_float(half << 16 | byte << 8);
    }
  }

  // Rounded to nearest, to 2^-17; NaN stays what it is.
  __device__ __forceinline__ void store_sums(int row, int column, const float (&x)[8]) const {
    if (column >= columns) return;
    uint32_t upper[4] = {}, lower[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = x[i] == x[i] ? __float_as_uint(x[i]) + 0x80 : 0x7fc00000;
      upper[i / 2] |= bits >> 16 << i % 2 * 16;
      lower[i / 4] |= (bits >> 8 & 0xff) << i % 4 * 8;
    }
    store_vector(out[row], column, columns, out.aligned, make_uint4(upper[0], upper[1], upper[2], upper[3]));
    if (low.aligned && column + 8 <= columns) {
      ptx::store_8(low[row] + column, make_uint2(lower[0], lower[1]));
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < columns) low[row][column + i] = static_cast<uint8_t>(lower[i / 4] >> i % 4 * 8);
    }
  }
};

// T: of the operands, if they have 16 bits.
template <class T>
Result<T> result_of(const Gemm& p) {
  const bool wide = p.out.dtype == DType::f32, wide_added = p.added.dtype == DType::f32;
  return {static_cast<int>(p.out.size(0)),
          static_cast<int>(p.out.size(1)),
          line_of(p.bias),
          wide_added ? Rows<const T>{} : rows_of<const T>(p.added),
          wide_added ? rows_of<const float>(p.added) : Rows<const float>{},
          wide ? Rows<T>{} : rows_of<T>(p.out),
          wide ? rows_of<float>(p.out) : Rows<float>{},
          0,
          rows_of<uint8_t>(p.low),
          p.goes_on,
          p.ends};
}

// The sums of parts, (parts, m, n) in p.room.
template <class T>
Result<T> parts_result_of(const Gemm& p) {
  const int64_t m = p.out.size(0), n = p.out.size(1);
  const bool aligned = n % 4 == 0 && reinterpret_cast<uintptr_t>(p.room.data) % 16 == 0;
  return {static_cast<int>(m),
          static_cast<int>(n),
          {},
          {},
          {},
          {},
          {p.room.as<float>(), n, aligned},
          m * n,
          {},
          false,
          true};
}

}  // namespace llmengine::cuda
