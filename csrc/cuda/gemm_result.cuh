// Where a product's sums go (gemm.h): bias and `added` join them on the way, or, where k is cut into parts, nothing
// yet.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/gemm.h"
#include "cuda/row.cuh"

namespace llmengine::cuda {

template <class T>
struct Result {
  int rows, columns;
  Line bias;
  Rows<const float> added;
  Rows<T> out;  // one of the two
  Rows<float> out_wide;
  int64_t part_stride;  // from one part's sums to the next one's

  __device__ __forceinline__ void store(int row, int column, int part, float (&x)[8]) const {
    if (row >= rows) return;
    add_line<T>(bias, column, columns, x);
    if (added.data) {
      float y[8];
      load_floats(added[row], column, columns, added.aligned, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += y[i];
    }
    if (out.data) {
      store_vector(out[row], column, columns, out.aligned, pack<T>(x));
    } else {
      store_floats(out_wide[row] + part * part_stride, column, columns, out_wide.aligned, x);
    }
  }
};

template <class T>
Result<T> result_of(const Gemm& p) {
  const bool wide = p.out.dtype == DType::f32;
  return {static_cast<int>(p.out.size(0)),
          static_cast<int>(p.out.size(1)),
          line_of(p.bias),
          rows_of<const float>(p.added),
          wide ? Rows<T>{} : rows_of<T>(p.out),
          wide ? rows_of<float>(p.out) : Rows<float>{},
          0};
}

// The sums of parts, (parts, m, n) in p.room.
template <class T>
Result<T> parts_result_of(const Gemm& p) {
  const int64_t m = p.out.size(0), n = p.out.size(1);
  const bool aligned = n % 4 == 0 && reinterpret_cast<uintptr_t>(p.room.data) % 16 == 0;
  return {static_cast<int>(m), static_cast<int>(n), {}, {}, {}, {p.room.as<float>(), n, aligned}, m * n};
}

}  // namespace llmengine::cuda
