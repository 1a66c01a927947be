// The host's side of kernels over gemm_sm90a.cuh: from matrices that TMA can fetch (hopper_refuses) to maps, tiles and
// grids.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/gemm_cores.h"
#include "cuda/gemm_sm90a.cuh"
#include "cuda/launch.cuh"

namespace llmengine::cuda::gemm_sm90a {

inline constexpr int kColumns = 256;  // of a tile, but for narrow results

inline int ceil_divide(int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); }

// Boxes of an operand (lines, k): lines of 64 k, or 64 lines for each of 64 k.
inline ptx::TensorMap map_of(const char* name, const TensorView& t, bool across, int lines) {
  const TensorView rows = across ? transposed(t) : t;
  return ptx::encode_tensor_map(
      tensor_map_fields(name, rows, {across ? kDepth : lines, across ? kPanel : kDepth}, Swizzle::bytes_128));
}

// a: (rows, k). b: lines of c's columns, as many a block fetches of each of the two.
inline Operands operands_of(const TensorView& a, bool a_across, const TensorView& b, bool b_across,
                            int columns = kColumns, const TensorView& a2 = {}, const TensorView& b2 = {}) {
  const auto left = map_of("a", a, a_across, kRows), right = map_of("b", b, b_across, columns / kCluster);
  return {{left, a2.defined() ? map_of("a2", a2, a_across, kRows) : left},
          {right, b2.defined() ? map_of("b2", b2, b_across, columns / kCluster) : right}};
}

inline Tiles tiles_of(int64_t rows, int64_t columns, int64_t depth, int columns_of_tile = kColumns, int products = 1) {
  const int steps = ceil_divide(depth, kDepth);
  return {ceil_divide(rows, kRows * kCluster), ceil_divide(columns, columns_of_tile), products * steps, steps};
}

// Clusters that run at once; they take all items.
inline int clusters_at_once() { return std::max(multiprocessors() / kCluster, 1); }

inline LaunchSite site(const char* kernel, const Tiles& tiles, const TensorView& operand, size_t shared_bytes,
                       Stream stream) {
  const int64_t items = int64_t{tiles.rows} * ceil_divide(tiles.columns, tiles.span) * tiles.parts;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(items, clusters_at_once()) * kCluster);
  return {kernel, dim3(blocks), dim3(kThreads), cuda_stream(stream), operand, shared_bytes, dim3(kCluster)};
}

}  // namespace llmengine::cuda::gemm_sm90a
