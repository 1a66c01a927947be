// The device's side of the grid (attention_grid.h), and what stands before and behind the one pass over it.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/attention_grid.h"
#include "cuda/attention_sm90a_backward.cuh"

namespace llmengine::cuda::attention {

// Rows of a tile that passes, of which kGridRows are one or more.
template <int D, bool simple>
inline constexpr int kGridPassing = D <= 64 || simple ? 64 : 32;

// Of a tile that passes each of the two warpgroups has a part: half of the rows, or of head dims above 64 all of them
// and 64 columns, or 32. Its numbers lie as threads have them: four at a time, those of a block of eight rows together.
template <int D, int passing>
struct Part {
  static constexpr int rows = D <= 64 ? passing / 2 : passing;

  static constexpr int columns(int group) { return D <= 64 || group == 0 ? kPanel : D - kPanel; }
  static constexpr int threads(int group) { return 2 * columns(group); }  // that have some
  static constexpr int numbers(int group) { return rows * columns(group); }
  static constexpr int first_row(int group) { return D <= 64 ? group * rows : 0; }
  static constexpr int first_column(int group) { return D <= 64 ? 0 : group * kPanel; }
};

inline constexpr int kOfRow = 4;  // numbers that are known of a row

// For each tile of each head: its numbers, D columns of kGridRows rows as attention_one_pass_sm90a has them, and of its
// rows base, delta, steps and shift, `passing` of each, then those of the next.
struct Grid {
  int32_t* numbers;
  float* rows;       // kOfRow of each
  int32_t* remade;   // [0]: how many tiles of kRemadeRows rows; then for each, at remade_place(), whether it is
  int32_t* largest;  // of each head of keys of each sequence, bits of the largest |k_jd|, |k_j|^2, |v_j|^2

  // Among the rows of all tiles: `row`, at which one of the grid or one that passes begins, of a sequence's head.
  __device__ __forceinline__ static int row_of(const Sizes& sizes, const Sequence& s, int head, int row) {
    const int first = first_place(s.index, s.row0, s.rows, kGridRows, sizes.cu_seqlens_q != nullptr);
    return ((first + row / kGridRows) * sizes.heads + head) * kGridRows + row % kGridRows;
  }
};

// The gradient of an additive mask, as the pass leaves it behind: what it is, where every score has an element of its
// own; where heads or sequences share them, sums of 64-bit integers.
struct MaskGradient {
  float* each;      // (sequences, heads, rows, keys), zeros; or null
  int64_t* sums;    // the same, but 1 of what is shared; or null
  int32_t* bounds;  // of each of their rows, bits of the largest; then whether a term is no number, or has none
  int64_t sequence, head, lines;  // rows from one to the next, 0 where they share them; rows in all
  int keys, bits;

  __device__ __forceinline__ int64_t line_of(const Sequence& s, int of_head, int row) const {
    return s.index * sequence + of_head * head + row;
  }
  __device__ __forceinline__ float steps(int64_t line) const {
    return steps_of(__uint_as_float(static_cast<uint32_t>(bounds[line])), bits);
  }
};

// A mask that rows share is attention_mask_sm80's.
inline bool is_gradient_of_the_pass(const AttentionBackwardOnePass& p) {
  return p.grad_mask.defined() && p.grad_mask.size(2) == p.query.size(2);
}

inline MaskGradient mask_gradient_of(const AttentionBackwardOnePass& p) {
  if (!is_gradient_of_the_pass(p)) return {};
  const TensorView& grad = p.grad_mask;
  const bool own = grad.size(0) == p.query.size(0) && grad.size(1) == p.heads();
  const auto terms = static_cast<uint64_t>(p.query.size(0) / grad.size(0) * (p.heads() / grad.size(1)));
  return {own ? grad.as<float>() : nullptr,
          own ? nullptr : p.mask_sums.as<int64_t>(),
          own ? nullptr : p.mask_bounds.as<int32_t>(),
          grad.size(0) == 1 ? 0 : grad.size(1) * grad.size(2),
          grad.size(1) == 1 ? 0 : grad.size(2),
          grad.size(0) * grad.size(1) * grad.size(2),
          static_cast<int>(grad.size(3)),
          kMaskBits - static_cast<int>(std::bit_width(terms - 1))};
}

inline Grid grid_of_call(const AttentionBackwardOnePass& p) {
  return {p.grid.as<int32_t>(), p.of_rows.as<float>(), p.remade.as<int32_t>(), p.largest.as<int32_t>()};
}

// Launched by run() in turn.
void run_one_pass(const AttentionBackwardOnePass& p, Stream stream);

}  // namespace llmengine::cuda::attention
