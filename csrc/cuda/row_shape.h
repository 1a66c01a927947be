// How rows lie on threads: chosen on the host, for kernels that keep a row in registers where it fits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "common/check.h"
#include "common/tensor.h"
#include "cuda/launch.cuh"

namespace llmengine::cuda {

inline constexpr int kNarrowRows = 4;  // rows of a block where a warp has one

// How a row lies on threads.
struct RowShape {
  int warps;    // of a row
  int vectors;  // of a thread; 0: the row does not fit into registers
  int rows;     // of a block

  dim3 block() const { return {32u * warps, static_cast<unsigned>(rows), 1}; }
};

// Warps are doubled until a thread's part of the row is at most `floats`, or there are `max_warps`.
inline RowShape shape_of(int columns, int lanes, int floats, int max_warps) {
  const int vectors = columns / lanes + (columns % lanes != 0), most = floats / lanes;
  int warps = 1;
  const auto each = [&] { return std::max(1, (vectors + 32 * warps - 1) / (32 * warps)); };
  while (each() > most && warps < max_warps) warps *= 2;
  return {warps, each() <= most ? each() : 0, warps == 1 ? kNarrowRows : 1};
}

inline int columns_of(const char* op, const TensorView& t) {
  // one vector and one step below the last int, so that the columns of a thread never overflow
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 2 * 1024 * 8;
  check(t.size(1) <= kMost, std::string(op) + ": rows of " + std::to_string(t.size(1)) +
                                " columns are not supported on CUDA; allowed: up to " + std::to_string(kMost));
  return static_cast<int>(t.size(1));
}

inline unsigned grid_of(int64_t rows, int rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int>::max()));
}

}  // namespace llmengine::cuda
