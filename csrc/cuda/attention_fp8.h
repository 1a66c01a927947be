// Attention, forward (ops/attention.h), on Hopper with products of 8-bit floats, e4m3, and the numbers that they are
// made of (attention_fp8_quantise_sm90a.cu, attention_fp8_forward_sm90a.cu).
//
//   A head's tokens lie in tiles of 128, counted within each sequence, what is missing being zeros; a tile is D bytes a
//   token, D the class of the head dim, and one float32 scale, a power of two, by which its numbers are multiplied.
//   Their places are those of attention_places.h.
//
//   Queries and keys are turned before they are rounded: row x of D numbers, zeros behind the head dim, becomes H (s
//   x), with H the Walsh-Hadamard matrix of 1 and -1, and s fixed signs. Products of a query and a key are D times as
//   large as before, and what few channels had is spread over all: no outlier costs the others their bits ("incoherent
//   processing", Shah et al. 2024).
//
//   A tile's bytes lie as wgmma reads them from shared memory, swizzled, so that copies in bulk bring them:
//     queries  64 rows, and 64 more; columns in panels of 128 (64, where D is 64)
//     keys     likewise, `keys_of_step` rows at a time
//     values   as many keys at a time: D rows of them, 16 keys each in the order that probabilities have in registers
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "common/check.h"
#include "cuda/attention_places.h"
#include "cuda/device.h"
#include "ops/attention.h"
#include "ops/fields.h"

namespace llmengine::cuda {

namespace attention {

inline constexpr int kByteRows = 128;  // of a tile of bytes

// Keys that a step of the walk has: wider heads leave registers for fewer.
constexpr int keys_of_step(int D) { return D <= 128 ? 128 : 64; }

// Where the 16 keys of a step lie: sums of a product have columns 2t, 2t + 1 and 8 + 2t, 9 + 2t in lane t of four, and
// an 8-bit operand 4t to 4t + 3.
constexpr int place_of_key(int key) { return key % 8 / 2 * 4 + key / 8 * 2 + key % 2; }

// Whether a column changes its sign before it is turned.
constexpr bool is_negated(int column) {
  return 0x9e3779b9u * (2 * static_cast<uint32_t>(column / 32) + 1) >> column % 32 & 1;
}

// The class of a head dim.
inline int byte_columns_of(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

inline int64_t byte_tiles_of(const TensorView& x, const TensorView& boundaries) {
  const bool packed = boundaries.defined();
  return count_places(packed ? boundaries.size(0) - 1 : x.size(0), x.size(2), kByteRows, packed);
}

// What is made of a tensor (batch, heads, tokens, columns) whose tokens `boundaries` cut.
inline void check_tiles(const Checker& at, const TensorView& numbers, const char* name, const TensorView& scales,
                        const char* scales_name, const TensorView& x, const TensorView& boundaries, int columns) {
  if (x.size(3) > columns) {
    at.fail_at(name, "have " + std::to_string(columns) + " columns for " + std::to_string(x.size(3)));
  }
  const int64_t tiles = byte_tiles_of(x, boundaries);
  at.defined(numbers, name);
  at.dtype(numbers, name, {DType::boolean});
  at.shape(numbers, name, {tiles, x.size(1), kByteRows * columns});
  at.contiguous(numbers, name);
  if (reinterpret_cast<uintptr_t>(numbers.data) % 16 != 0) at.fail_at(name, "must begin at a multiple of 16 bytes");
  at.defined(scales, scales_name);
  at.dtype(scales, scales_name, {DType::f32});
  at.shape(scales, scales_name, {tiles, x.size(1)});
  at.contiguous(scales, scales_name);
}

}  // namespace attention

struct AttentionFp8Quantise {
  TensorView x;           // (batch, heads, tokens, head_dim), bfloat16 or float16
  TensorView cu_seqlens;  // as in ops/attention.h, or none
  std::string operand;    // "query", "key" or "value"
  TensorView numbers;     // bytes (tiles, heads, 128 D), D one of 64, 128, 256
  TensorView scales;      // float32 (tiles, heads)

  static constexpr auto fields() {
    using P = AttentionFp8Quantise;
    return std::tuple{ops::field("x", &P::x), ops::field("cu_seqlens", &P::cu_seqlens),
                      ops::field("operand", &P::operand), ops::field("numbers", &P::numbers),
                      ops::field("scales", &P::scales)};
  }
};

// Of query, key and value, the shapes: numbers are of the class of query's head dim.
struct AttentionFp8Forward : ops::AttentionForward {
  TensorView query_numbers, key_numbers, value_numbers;
  TensorView query_scales, key_scales, value_scales;
  TensorView turns;  // as AttentionForwardSm90a has them

  static constexpr auto fields() {
    using P = AttentionFp8Forward;
    return std::tuple_cat(
        ops::AttentionForward::fields(),
        std::tuple{ops::field("query_numbers", &P::query_numbers), ops::field("key_numbers", &P::key_numbers),
                   ops::field("value_numbers", &P::value_numbers), ops::field("query_scales", &P::query_scales),
                   ops::field("key_scales", &P::key_scales), ops::field("value_scales", &P::value_scales),
                   ops::field("turns", &P::turns)});
  }
};

void validate(const AttentionFp8Quantise& p);
void validate(const AttentionFp8Forward& p);
void run(const AttentionFp8Quantise& p, Stream stream);
void run(const AttentionFp8Forward& p, Stream stream);

}  // namespace llmengine::cuda
