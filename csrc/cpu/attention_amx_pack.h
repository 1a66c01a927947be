// Operands of attention's AMX kernels as tiles: a row of a tile after another, and a tile after another.
#pragma once

#include "cpu/attention_products.h"

#if defined(LLMENGINE_AMX)

namespace llmengine::cpu::LLMENGINE_ISA {

inline constexpr int kUnitRows = kAmxRows, kChunkKeys = 32, kTileHalves = 512, kTileFloats = 256;

// 16 rows as a right operand: pairs of columns, a row in each lane.
inline void pack_unit(const Rows<const bf16>& x, int64_t rows, bf16* to) {
  for (int64_t k = 0; k < x.columns; k += 2 * kLanes, to += kTileHalves) {
    U block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = i < rows ? consecutive(x.row(i) + k, x.columns - k) : U{};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_pairs(to + 2 * i * kLanes, block[i]);
  }
}

// Rows come into the second-level cache while others are worked on.
inline void fetch_rows(const Rows<const bf16>& x, int64_t first, int64_t end) {
  for (int64_t r = first; r < end; ++r) {
    for (int64_t c = 0; c < x.columns; c += 32) __builtin_prefetch(x.row(r) + c, 0, 2);
  }
}

// A chunk of keys as a left operand, in tiles of 16 keys and 32 columns, `steps` side by side; zeros beyond.
inline void pack_keys(const Rows<const bf16>& x, int64_t first, int64_t count, int64_t steps, bf16* to) {
  for (int64_t key = 0; key < kChunkKeys; ++key) {
    bf16* line = to + (key / kAmxRows * steps * kAmxRows + key % kAmxRows) * 2 * kLanes;
    for (int64_t k = 0; k < steps * 2 * kLanes; k += 2 * kLanes, line += kTileHalves) {
      store_pairs(line, key < count && k < x.columns ? consecutive(x.row(first + key) + k, x.columns - k) : U{});
    }
  }
}

// A chunk of values as a left operand, transposed, in tiles of 16 columns and 32 keys.
inline void pack_values(const Rows<const bf16>& x, int64_t first, int64_t count, bf16* to) {
  for (int64_t c = 0; c < x.columns; c += kAmxRows, to += kTileHalves) {
    const bf16* from = x.row(first) + c;
    if (count < kChunkKeys || x.columns - c < kAmxRows) {
      pack_lines_transposed(from, x.stride, std::min<int64_t>(kAmxRows, x.columns - c), count, to, kChunkKeys);
      continue;
    }
    U block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      block[i] = halves(from + 2 * i * x.stride) | halves(from + (2 * i + 1) * x.stride) << 16;
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_pairs(to + 2 * i * kLanes, block[i]);
  }
}

// Rows j and 16 + j side by side, as right operands of sums over 32 rows: tiles of 16 columns.
inline void pack_row_pairs(const Rows<const bf16>& x, int64_t rows, bf16* to) {
  for (int64_t c = 0; c < x.columns; c += kLanes, to += kTileHalves) {
    const auto half = [&](int64_t r) { return r < rows ? halves(x.row(r) + c, x.columns - c) : U{}; };
    for (int j = 0; j < kLanes; ++j) store_pairs(to + 2 * j * kLanes, half(j) | half(kLanes + j) << 16);
  }
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
#endif
