// What Hopper's attention kernels share, forward and backward: boxes of (batch, heads, tokens, columns) tensors, rows
// of neighbours cleared from them, and the drawing of tiles (attention_schedule.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/attention_call.h"
#include "cuda/attention_logits.cuh"
#include "cuda/attention_schedule.h"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/wgmma_tile.cuh"

namespace llmengine::cuda::attention {

// Where a walk in tiles through what a tile sees begins; at its end, where it sees nothing.
__device__ __forceinline__ int begin_of_walk(const Span& seen, int tile) {
  return seen.begin < seen.end ? seen.begin / tile * tile : seen.end;
}

// Tokens from `row` on, as panels that lie `panel_bytes` apart.
template <int panels>
__device__ __forceinline__ void fetch(uint16_t* to, int panel_bytes, const ptx::TensorMap* map, ptx::Mbarrier* full,
                                      int row, int head, int64_t batch) {
#pragma unroll
  for (int p = 0; p < panels; ++p)
    ptx::copy_tensor(to + p * panel_bytes / 2, map, full, p * kPanel, row, head, static_cast<int>(batch));
}

// Rows from `row` on of a tile of `rows`, by the warp.
template <int panels, int rows>
__device__ __forceinline__ void clear_rows(uint16_t* tile, int row) {
#pragma unroll 1
  for (int p = 0; p < panels; ++p)
#pragma unroll 1
    for (int i = row * 8 + lane_of(); i < rows * 8; i += 32)  // chunks of 16 bytes
      reinterpret_cast<uint4*>(tile + p * rows * kPanel)[i] = make_uint4(0, 0, 0, 0);
}

// The next turn, by the whole warp, of which one lane draws.
__device__ __forceinline__ int draw_turn(int* turns, bool elected) {
  int number = elected ? static_cast<int>(gridDim.x) + atomicAdd(turns, 1) : 0;  // what one lane knows
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) number |= __shfl_xor_sync(kWholeWarp, number, lanes);
  return number;
}

inline ptx::TensorMap map_of_tokens(const char* name, const TensorView& t, int tokens) {
  return ptx::encode_tensor_map(tensor_map_fields(name, t, {1, 1, tokens, kPanel}, Swizzle::bytes_128));
}

// body(T{}, the classes of the head dim and of values'), both the same but where values are much narrower: 192 and 128
// are a class of their own (DeepSeek-AI 2024, of which 64 columns are positions).
template <int... dims, class Body>
void visit_pairs_of_dims(const ops::AttentionOptions& p, const Body& body) {
  constexpr bool has_split = ((dims == 192) || ...);
  const int64_t dim = p.query.size(3), value_dim = p.value.size(3);
  visit_dims<dims...>(p, [&](auto type, auto same) {
    if constexpr (has_split && same == 192) {
      if (dim > 128 && value_dim <= 128) return body(type, same, std::integral_constant<int, 128>{});
    }
    body(type, same, same);
  });
}

}  // namespace llmengine::cuda::attention
