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

  // A vector of `added` as it lies in memory: an epilogue asks for several before it uses the first.
  struct Added {
    uint4 low, high;
  };

  __device__ __forceinline__ Added load(int row, int column) const {
    Added x{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    if (row >= rows) return x;
    if (added.data) {
      x.low = load_vector(added[row], column, columns, added.aligned);
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
    } else if (added_wide.data) {
      float low[4], high[4];
      unpack<float>(more.low, low);
      unpack<float>(more.high, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] += low[i], x[4 + i] += high[i];
    }
    if (out.data) {
      store_vector(out[row], column, columns, out.aligned, pack<T>(x));
    } else {
      store_floats(out_wide[row] + part * part_stride, column, columns, out_wide.aligned, x);
    }
  }
};

// T: of the operands, if they have 16 bits.
template <class T>
Result<T> result_of(const TensorView& bias, const TensorView& added, const TensorView& out) {
  const bool wide = out.dtype == DType::f32, wide_added = added.dtype == DType::f32;
  return {static_cast<int>(out.size(0)),
          static_cast<int>(out.size(1)),
          line_of(bias),
          wide_added ? Rows<const T>{} : rows_of<const T>(added),
          wide_added ? rows_of<const float>(added) : Rows<const float>{},
          wide ? Rows<T>{} : rows_of<T>(out),
          wide ? rows_of<float>(out) : Rows<float>{},
          0};
}

// The sums of parts, (parts, m, n) in p.room.
template <class T>
Result<T> parts_result_of(const Gemm& p) {
  const int64_t m = p.out.size(0), n = p.out.size(1);
  const bool aligned = n % 4 == 0 && reinterpret_cast<uintptr_t>(p.room.data) % 16 == 0;
  return {static_cast<int>(m), static_cast<int>(n), {}, {}, {}, {}, {p.room.as<float>(), n, aligned}, m * n};
}

}  // namespace llmengine::cuda
