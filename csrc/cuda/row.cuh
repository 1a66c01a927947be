// Rows of a matrix as threads see them: in vectors of 16 bytes, where alignment allows, else element by element; in
// registers always as floats.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/half.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#ifndef __CUDACC_RTC__  // NVRTC (cuda/compiled.h) sees what is the device's
#include "common/tensor.h"
#endif

namespace llmengine::cuda {

template <class T>
inline constexpr int kLanes = 16 / sizeof(T);  // elements of a vector

// ---- conversions ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) { return ptx::float_of_f16(x.bits); }

template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high);
template <>
__device__ __forceinline__ uint32_t pair_of<bf16>(float low, float high) {
  return ptx::bf16x2_of(low, high);
}
template <>
__device__ __forceinline__ uint32_t pair_of<f16>(float low, float high) {
  return ptx::f16x2_of(low, high);
}

template <class T>
__device__ __forceinline__ T narrowed(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return {static_cast<uint16_t>(pair_of<T>(x, 0.0f))};
  }
}

// The floats in a 32-bit word of T.
__device__ __forceinline__ void unpack_word(uint32_t word, float (&x)[1], float) { x[0] = __uint_as_float(word); }
__device__ __forceinline__ void unpack_word(uint32_t word, float (&x)[2], bf16) {
  x[0] = __uint_as_float(word << 16);
  x[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(uint32_t word, float (&x)[2], f16) {
  x[0] = ptx::float_of_f16(static_cast<uint16_t>(word));
  x[1] = ptx::float_of_f16(static_cast<uint16_t>(word >> 16));
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& vector, float (&x)[kLanes<T>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float part[kPerWord];
    unpack_word(words[w], part, T{});
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) x[w * kPerWord + i] = part[i];
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kLanes<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      words[w] = __float_as_uint(x[w]);
    } else {
      words[w] = pair_of<T>(x[2 * w], x[2 * w + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

#ifndef __CUDACC_RTC__
// Whether every row begins at a multiple of 16 bytes. A tensor that was not given has no rows.
inline bool has_aligned_rows(const TensorView& t) {
  const auto address = reinterpret_cast<uintptr_t>(t.data);
  const bool one_row = t.ndim < 2 || t.sizes[0] <= 1;
  return address % 16 == 0 && (one_row || t.strides[0] * size_of(t.dtype) % 16 == 0);
}
#endif

template <class T>
struct Rows {
  T* data = nullptr;  // null: the tensor was not given
  int64_t stride = 0;
  bool aligned = false;

  __device__ T* operator[](int64_t row) const { return data + row * stride; }
};

#ifndef __CUDACC_RTC__
template <class T>
Rows<T> rows_of(const TensorView& t) {
  if (!t.defined()) return {};
  return {t.as<T>(), t.ndim > 1 ? t.stride(0) : 0, has_aligned_rows(t)};
}
#endif

// The vector of columns [column, columns) of a row, zeros where the row has ended. `once`: no other row reads it.
template <class T>
__device__ __forceinline__ uint4 load_vector(const T* row, int column, int columns, bool aligned, bool once = true) {
  if (column >= columns) return make_uint4(0, 0, 0, 0);
  const T* from = row + column;
  if (aligned && column + kLanes<T> <= columns) return once ? ptx::load_16_once(from) : ptx::load_16(from);
  constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (column + i >= columns) continue;
    uint32_t bits;
    if constexpr (sizeof(T) == 4) {
      bits = __float_as_uint(from[i]);
    } else {
      bits = from[i].bits;
    }
    words[i / kPerWord] |= bits << (i % kPerWord * 16);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Stores the part of a vector that lies in the row.
template <class T>
__device__ __forceinline__ void store_vector(T* row, int column, int columns, bool aligned, const uint4& vector) {
  if (column >= columns) return;
  T* to = row + column;
  if (aligned && column + kLanes<T> <= columns) {
    ptx::store_16(to, vector);
    return;
  }
  constexpr int kPerWord = 4 / sizeof(T);
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (column + i >= columns) continue;
    const uint32_t bits = words[i / kPerWord] >> (i % kPerWord * 16);
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(bits);
    } else {
      to[i].bits = static_cast<uint16_t>(bits);
    }
  }
}

// A row that may begin anywhere: elements one by one until the first multiple of 16 bytes, vectors, and the elements
// that are left. For rows whose stride is no multiple of 16 bytes (50257 classes), which need not be read one by one.
struct RowParts {
  int head, vectors, tail;  // elements, vectors, elements

  __device__ int singles() const { return head + tail; }
  // the column of a single element, in a row of `columns`
  __device__ int column_of(int single, int columns) const {
    return single < head ? single : columns - singles() + single;
  }
};

template <class T>
__device__ __forceinline__ RowParts parts_of(const T* row, int columns) {
  constexpr int n = kLanes<T>;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % n), head = past ? n - past : 0;
  if (head >= columns) return {columns, 0, 0};
  return {head, (columns - head) / n, (columns - head) % n};
}

// Of two rows at once: all singles where they do not lie alike.
template <class T>
__device__ __forceinline__ RowParts parts_of(const T* one, const T* other, int columns) {
  const auto apart = reinterpret_cast<uintptr_t>(one) - reinterpret_cast<uintptr_t>(other);
  return apart % 16 == 0 ? parts_of(one, columns) : RowParts{columns, 0, 0};
}

// ---- parameters -----------------------------------------------------------------------------------------------------

// One row that all rows use, weights or biases: of the rows' own dtype T, or float32.
struct Line {
  const void* data = nullptr;
  bool is_float = false, aligned = false;
};

#ifndef __CUDACC_RTC__
inline Line line_of(const TensorView& t) {
  if (!t.defined()) return {};
  return {t.data, t.dtype == DType::f32, has_aligned_rows(t)};
}
#endif

// n floats from `column` on, zeros where the line has ended.
template <class S, int n>
__device__ __forceinline__ void load_floats(const S* line, int column, int columns, bool aligned, float (&x)[n]) {
  static_assert(n % kLanes<S> == 0);
#pragma unroll
  for (int first = 0; first < n; first += kLanes<S>) {
    float part[kLanes<S>];
    unpack<S>(load_vector(line, column + first, columns, aligned, false), part);
#pragma unroll
    for (int i = 0; i < kLanes<S>; ++i) x[first + i] = part[i];
  }
}

// n floats into a line, as far as it goes.
template <int n>
__device__ __forceinline__ void store_floats(float* line, int column, int columns, bool aligned, const float (&x)[n]) {
#pragma unroll
  for (int first = 0; first < n; first += 4) {
    const float part[4] = {x[first], x[first + 1], x[first + 2], x[first + 3]};
    store_vector(line, column + first, columns, aligned, pack<float>(part));
  }
}

// load_floats of parameters; `missing` everywhere if there are none.
template <class T>
__device__ __forceinline__ void load_line(const Line& line, int column, int columns, float missing,
                                          float (&x)[kLanes<T>]) {
  if (!line.data) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] = missing;
  } else if (line.is_float) {
    load_floats(static_cast<const float*>(line.data), column, columns, line.aligned, x);
  } else {
    load_floats(static_cast<const T*>(line.data), column, columns, line.aligned, x);
  }
}

// Adds them to x, if there are any.
template <class T>
__device__ __forceinline__ void add_line(const Line& line, int column, int columns, float (&x)[kLanes<T>]) {
  if (!line.data) return;
  float given[kLanes<T>];
  load_line<T>(line, column, columns, 0.0f, given);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] += given[i];
}

}  // namespace llmengine::cuda
