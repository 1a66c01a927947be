// Attention (ops/attention.h) on Hopper, by TMA and wgmma (attention_sm90a_*.cu), of what tensor maps can tell:
// operands that are not empty, begin at multiples of 16 bytes and have strides that are positive multiples of them.
// Backward, the statistics of rows and the gradients of biases are those of every GPU's kernels.
#pragma once

#include <tuple>

#include "cuda/attention.h"
#include "cuda/device.h"
#include "ops/attention.h"

namespace llmengine::cuda {

struct AttentionForwardSm90a : ops::AttentionForward {
  TensorView turns;  // int32 (1, 4), 0: from which blocks draw their tiles. Of packed sequences as it comes, 4 (tokens
                     // / 64 + sequences) longer, of tokens the more of rows and keys: room for those tiles' order

  TensorView spans;  // int32 (mask's first size, 2), room, where the mask is padding's; or none

  static constexpr auto fields() {
    using P = AttentionForwardSm90a;
    return std::tuple_cat(ops::AttentionForward::fields(),
                          std::tuple{ops::field("turns", &P::turns), ops::field("spans", &P::spans)});
  }
};

struct AttentionBackwardSm90a : AttentionBackward {
  TensorView turns;  // the same of two kernels, (2, ...)

  TensorView spans;  // as above

  static constexpr auto fields() {
    using P = AttentionBackwardSm90a;
    return std::tuple_cat(AttentionBackward::fields(),
                          std::tuple{ops::field("turns", &P::turns), ops::field("spans", &P::spans)});
  }
};

// The same in one pass (attention_sm90a_one_pass.cu), of head dims up to D, 64, 96 or 128, with tiles of kGridRows rows
// (attention_grid.h), at places of attention_places.h. Integers come as zeros, and so does grad_mask where it is each
// score's own.
struct AttentionBackwardOnePass : AttentionBackwardSm90a {
  TensorView grid;     // int32 (tiles, heads, kGridRows, D)
  TensorView remade;   // int32 (1 + places of kRemadeRows rows * heads,)
  TensorView largest;  // int32 (sequences, key heads, 3)
  TensorView squares;  // float32 (2, batch, heads, rows), room
  TensorView of_rows;  // float32 (tiles, heads, 4, kGridRows), room
  // Where grad_mask is not each score's own and has a row for each: int64, like it, and int32 (its rows + 1,).
  TensorView mask_sums, mask_bounds;

  static constexpr auto fields() {
    using P = AttentionBackwardOnePass;
    return std::tuple_cat(
        AttentionBackwardSm90a::fields(),
        std::tuple{ops::field("grid", &P::grid), ops::field("remade", &P::remade), ops::field("largest", &P::largest),
                   ops::field("squares", &P::squares), ops::field("of_rows", &P::of_rows),
                   ops::field("mask_sums", &P::mask_sums), ops::field("mask_bounds", &P::mask_bounds)});
  }
};

void validate(const AttentionForwardSm90a& p);
void validate(const AttentionBackwardSm90a& p);
void validate(const AttentionBackwardOnePass& p);
void run(const AttentionForwardSm90a& p, Stream stream);
void run(const AttentionBackwardSm90a& p, Stream stream);
void run(const AttentionBackwardOnePass& p, Stream stream);

}  // namespace llmengine::cuda
