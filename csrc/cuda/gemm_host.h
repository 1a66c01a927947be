// The host's side of kernels over gemm_sm80.cuh: from tensors to operands and grids.
#pragma once

#include <limits>
#include <string>

#include "common/check.h"
#include "cuda/gemm_sm80.cuh"
#include "cuda/launch.cuh"

namespace llmengine::cuda::gemm {

// body(T{}) for the type of a product's operands; the contract has admitted no other.
template <class Body>
void visit_type(DType dtype, const Body& body) {
  dtype == DType::bf16 ? body(bf16{}) : body(f16{});
}

// A matrix of (lines, k). Its lines lie `along` k or `across` it, as the template says.
template <class T, bool across>
Operand<T, across> operand_of(const TensorView& t) {
  const int64_t stride = t.stride(across ? 1 : 0);
  const bool one_row = t.size(across ? 1 : 0) <= 1;
  const bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (one_row || stride % 8 == 0);
  return {t.as<T>(), stride, static_cast<int>(t.size(0)), aligned};
}

inline bool lies_along(const TensorView& t) { return t.size(1) <= 1 || t.stride(1) == 1; }
inline bool lies_across(const TensorView& t) { return t.size(0) <= 1 || t.stride(0) == 1; }

// Columns are numbered in ints, past the last of them by up to a tile.
inline void check_sizes(const char* op, std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 2 * kTile;
  for (int64_t size : sizes) {
    check(size <= kMost, std::string(op) + ": sizes of " + std::to_string(size) +
                             " are not supported on CUDA; allowed: up to " + std::to_string(kMost));
  }
}

inline int tiles_of(int64_t size, int tile = kTile) { return static_cast<int>((size + tile - 1) / tile); }

inline unsigned blocks_of(const char* op, int64_t row_tiles, int64_t column_tiles) {
  const int64_t blocks = row_tiles * column_tiles;
  check(blocks <= std::numeric_limits<int>::max(),
        std::string(op) + ": more than 2^31 tiles are not supported on CUDA");
  return static_cast<unsigned>(blocks);
}

inline LaunchSite site(const char* kernel, unsigned blocks, const TensorView& operand, Stream stream) {
  return {kernel, dim3(blocks), dim3(kThreads), cuda_stream(stream), operand, kSharedBytes};
}

}  // namespace llmengine::cuda::gemm
