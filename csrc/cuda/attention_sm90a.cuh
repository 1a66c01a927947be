// What Hopper's attention kernels share, forward and backward: boxes of (batch, heads, tokens, columns) tensors, rows
// of neighbours cleared from them, and the drawing of tiles (attention_schedule.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/attention_call.h"
#include "cuda/attention_logits.cuh"
#include "cuda/attention_schedule.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/wgmma_tile.cuh"

namespace llmengine::cuda::attention {

// ---- work of the forward kernels
// -------------------------------------------------------------------------------------

// A tile of rows from `first` on of a head of a sequence, and the keys [begin, end) that it goes through.
struct Work {
  Sequence s;
  int head, first, begin, end;

  __device__ bool some() const { return begin < end; }
};

template <class S, class P>
__device__ __forceinline__ Work work_of(const P& p, int turn) {
  const auto [tile, owner] = p.schedule.at(turn);
  const Sequence s = sequence_of(p.sizes, owner / p.sizes.heads);
  const int first = tile * S::rows;
  const Span span = keys_of_rows(s.band(p.options), first, S::rows);
  return {s, owner % p.sizes.heads, first, begin_of_walk(span, S::keys), span.end};
}

// Whose turn it is, to begin products or to make exponentials: a warpgroup's after the one before it, the first one's
// after the last one.
template <class S>
struct Order {
  int group;

  static constexpr int kFirst = 1 + S::groups, kThreads = 256;  // ids of barriers; those who wait and who let go on

  __device__ __forceinline__ void begin() const {
    if (S::by_turns && group == S::groups - 1) ptx::barrier_arrive(kFirst, kThreads);
  }
  __device__ __forceinline__ void take() const {
    if constexpr (S::by_turns) ptx::barrier_sync(kFirst + group, kThreads);
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (S::by_turns) ptx::barrier_arrive(kFirst + (group + 1) % S::groups, kThreads);
  }
  __device__ __forceinline__ void end() const {
    if (S::by_turns && group == 0) ptx::barrier_sync(kFirst, kThreads);
  }
};

// ---- tiles
// -----------------------------------------------------------------------------------------------------------

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
