// What Hopper's attention kernels share, forward and backward: boxes of (batch, heads, tokens, columns) tensors, rows
// of neighbours cleared from them, the drawing of tiles (attention_schedule.h, attention_packed.h), and padding.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/attention_call.h"
#include "cuda/attention_logits.cuh"
#include "cuda/attention_packed.h"
#include "cuda/attention_schedule.h"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/wgmma_tile.cuh"

namespace llmengine::cuda::attention {

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

// ---- turns ----------------------------------------------------------------------------------------------------------

inline constexpr int kTurnsRoom = 4;  // numbers of `room` beside the list
inline constexpr int kLeastOwn = 64;  // lines of a tile: no kernel's are fewer

// In which order the blocks of a kernel take tiles.
struct Turns {
  Schedule schedule;  // unless sequences are packed
  int* room;          // [0]: turns drawn so far, beside each block's first; where they are, [1]: tiles of a head,
                      // [2]: heads together, and behind kTurnsRoom the list
  int heads;          // that have tiles
  bool packed;

  // Beyond the last one no tile, -1. What follows from turns alone stays in no register between them.
  __device__ __forceinline__ Place at(int turn) const {
    const int all_heads = ptx::made_here(heads);
    if (packed) {
      if (turn >= room[1] * all_heads) return {-1, 0, 0};
      const auto* tiles = reinterpret_cast<const PackedTile*>(room + kTurnsRoom);
      const PackedTurn taken = packed_turn(tiles, all_heads, room[2], turn);
      return {taken.tile, taken.head, taken.sequence};
    }
    const Schedule even{ptx::made_here(schedule.tiles), schedule.owners, ptx::made_here(schedule.together),
                        schedule.last_first};
    if (turn >= even.count()) return {-1, 0, 0};
    const auto [tile, owner] = even.at(turn);
    return {tile, owner % all_heads, owner / all_heads};
  }

  // The next one, by the whole warp, of which one lane draws.
  __device__ __forceinline__ int draw(bool elected) const {
    int number = elected ? static_cast<int>(gridDim.x) + atomicAdd(room, 1) : 0;  // what one lane knows
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) number |= __shfl_xor_sync(kWholeWarp, number, lanes);
    return number;
  }
};

// A kernel's tiles: of rows or keys, lines of one, of one that passes, and bytes of each line that does.
struct TilesOf {
  bool keys;
  int own, passing;
  int64_t line_bytes;
};

// Of packed sequences a kernel makes the order, in `room`, before the one whose turns they are.
Turns turns_of(const ops::AttentionOptions& p, const TilesOf& of, int* room, Stream stream);
int64_t turns_room(const ops::AttentionOptions& p);  // numbers

struct PlaceAt {
  Sequence s;
  int tile;
};

__device__ __forceinline__ PlaceAt at_place(const Sizes& sizes, bool keys, int place, int lines) {
  const Spot spot = spot_of(sizes, keys, place, lines, false);
  return {sequence_of(sizes, spot.sequence), spot.tile};
}

inline int64_t places_of(const ops::AttentionOptions& p, bool keys, int lines) {
  if (p.sequences() == 0) return 0;
  return count_places(p.sequences(), (keys ? p.key : p.query).size(2), lines, p.packed());
}

// A block for every place of every head that owns tiles.
inline dim3 grid_of_places(const ops::AttentionOptions& p, bool keys, int lines) {
  return grid_of_tiles(places_of(p, keys, lines) * (keys ? p.key_heads() : p.heads()), multiprocessors());
}
// Packed tokens that belong to no sequence want one even where there are no sequences.
inline dim3 persistent_blocks(const ops::AttentionOptions& p, const TilesOf& of) {
  const unsigned tiles = grid_of_places(p, of.keys, of.own).x, least = p.packed() ? 1 : 0;
  return dim3(std::min(std::max(tiles, least), static_cast<unsigned>(multiprocessors())));
}

// ---- padding --------------------------------------------------------------------------------------------------------

// Keys that padding does not hide (is_padding()): which, and of each sequence from where to where there are any.
struct Seen {
  const uint8_t* keys;  // null: all
  int64_t batch;        // 0: those of all sequences
  const int32_t* spans;
};

// What of a tile's span is seen: keys, or, where it has none itself, no rows.
__device__ __forceinline__ Span seen_keys(const Seen& seen, const Sequence& s, Span span) {
  if (!seen.keys) return span;
  const int32_t* all = seen.spans + (seen.batch ? 2 * s.batch : 0);
  span.begin = largest(span.begin, all[0]), span.end = largest(span.begin, least(span.end, all[1]));
  return span;
}
__device__ __forceinline__ Span seen_rows(const Seen& seen, const Sequence& s, const Span& span, int first, int count) {
  const Span own = seen_keys(seen, s, {first, first + count});
  return own.begin < own.end ? span : Span{};
}

__device__ __forceinline__ bool is_seen(const Seen& seen, const Sequence& s, int key) {
  const int batch = ptx::made_here(static_cast<int>(s.batch));  // where its mask begins stays in no register
  return key >= s.keys || seen.keys[batch * seen.batch + key];
}

// Logits of rows to -inf where a key is hidden; as hide_unseen(). A bit tells of each key: a lane reads one of 32.
template <int n>
__device__ __forceinline__ void hide_padding(float (&x)[1][n][4], const Seen& seen, const Sequence& s, int first) {
  constexpr int kWords = (n + 3) / 4;
  uint32_t words[kWords], all = ~0u;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words[w] = __ballot_sync(kWholeWarp, is_seen(seen, s, first + 32 * w + lane_of()));
    all &= words[w];
  }
  if (all == ~0u) return;
#pragma unroll
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(words[j / 4] >> (8 * (j % 4) + lane_of() % 4 * 2 + i % 2) & 1)) x[0][j][i] = -INFINITY;
}

// What a warp's 16 keys have, from `first` on, to 0 where they are hidden.
template <int n>
__device__ __forceinline__ void clear_hidden(float (&x)[1][n][4], const Seen& seen, const Sequence& s, int first) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (is_seen(seen, s, first + 8 * half + lane_of() / 4)) continue;
#pragma unroll
    for (int j = 0; j < n; ++j) x[0][j][2 * half] = x[0][j][2 * half + 1] = 0.0f;
  }
}

// `spans`: int32 (1 or batch, 2), which run_seen() fills where there is padding.
inline Seen seen_of(const ops::AttentionOptions& p, const TensorView& spans) {
  if (!is_padding(p)) return {};
  return {p.mask.as<const uint8_t>(), p.mask.size(0) == 1 ? 0 : p.mask.stride(0), spans.as<int32_t>()};
}
void run_seen(const ops::AttentionOptions& p, const TensorView& spans, Stream stream);
void check_spans(const Checker& at, const ops::AttentionOptions& p, const TensorView& spans);

// ---- tensor maps ----------------------------------------------------------------------------------------------------

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
