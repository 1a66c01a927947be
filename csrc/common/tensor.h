// A tensor as every kernel sees it: where its elements lie, what they are, and how far apart.
// It owns nothing. Offsets are int64 everywhere: a 2^31-element tensor is ordinary in training.
#pragma once

#include <cstdint>
#include <string>

#include "common/half.h"

namespace llmengine {

enum class DType : uint8_t { f32, bf16, f16, f64, i32, i64, boolean };

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::f64: return "float64";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::boolean: return "bool";
  }
  return "unknown";
}

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::boolean: return 1;
  }
  return 0;
}

inline constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = -1;  // -1: no tensor was given (Python's None)
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  bool defined() const { return ndim >= 0; }
  int64_t size(int dim) const { return sizes[dim < 0 ? ndim + dim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? ndim + dim : dim]; }

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= sizes[d];
    return n;
  }

  // Strides of dimensions of size one never matter, nor those of a tensor without elements.
  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  std::string shape() const {
    std::string text = "(";
    for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
    return text + (ndim == 1 ? ",)" : ")");
  }
};

}  // namespace llmengine
