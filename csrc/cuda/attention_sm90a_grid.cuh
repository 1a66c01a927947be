// The device's side of the grid (attention_grid.h), and what stands before and behind the one pass over it.
#pragma once

#include <cstdint>

#include "cuda/attention_grid.h"
#include "cuda/attention_sm90a_backward.cuh"

namespace llmengine::cuda::attention {

// Rows of a tile that passes, of which kGridRows are one or more.
template <int D, bool simple>
inline constexpr int kGridPassing = D <= 64 || simple ? 64 : 32;

inline constexpr int kOfRow = 4;  // numbers that are known of a row

// For each tile of each head: its numbers, D columns of kGridRows rows as attention_one_pass_sm90a has them, and of its
// rows base, delta, steps and shift, `passing` of each, then those of the next.
struct Grid {
  int32_t* numbers;
  float* rows;       // kOfRow of each
  int32_t* remade;   // [0]: how many tiles of kRemadeRows rows; then for each head of each sequence, which
  int32_t* largest;  // of each head of keys of each sequence, bits of the largest |k_jd|, |k_j|^2, |v_j|^2
  int row_tiles;     // of kRemadeRows rows, of the longest sequence

  // Among the rows of all tiles: `row`, at which one of the grid or one that passes begins, of a sequence's head.
  __device__ __forceinline__ static int row_of(const Sizes& sizes, const Sequence& s, int head, int row) {
    const int first = grid_tile(s.index, s.row0, s.rows, sizes.cu_seqlens_q != nullptr);
    return ((first + row / kGridRows) * sizes.heads + head) * kGridRows + row % kGridRows;
  }
  // Of the tile that may be made anew, among `remade`; a sequence may be longer than it should be.
  __device__ __forceinline__ int flag_of(const Sizes& sizes, const Sequence& s, int head, int row) const {
    return 1 + (s.index * sizes.heads + head) * row_tiles + least(row / kRemadeRows, row_tiles - 1);
  }
};

inline Grid grid_of_call(const AttentionBackwardOnePass& p, int row_tiles) {
  return {p.grid.as<int32_t>(), p.of_rows.as<float>(), p.remade.as<int32_t>(), p.largest.as<int32_t>(), row_tiles};
}

// Launched by run() in turn.
void run_one_pass(const AttentionBackwardOnePass& p, Stream stream);

}  // namespace llmengine::cuda::attention
