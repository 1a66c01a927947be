// Dropout multipliers of a run of columns: 0 where the generator of ops/philox.h drops, 1 / (1 - p) elsewhere.
#pragma once

#include "cpu/philox_block.h"

namespace llmengine::cpu::LLMENGINE_ISA {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float keep_scale = 1.0f;
  bool active = false;

  // Of rows that lie across: so many are drawn together, as registers allow.
  static constexpr int kBlockRows = 16, kBlockColumns = kLanes == 16 ? 16 : 4;

  Dropout(double p, const TensorView& seed_tensor) {
    active = p > 0;
    if (!active) return;
    seed = static_cast<uint64_t>(*seed_tensor.as<int64_t>());
    threshold = ops::drop_threshold(p);
    keep_scale = static_cast<float>(1.0 / (1.0 - p));
  }

  // out[i] for columns [column, column + n) of a row; column is a multiple of 4. Draws up to the next multiple of
  // kRowDraws into a buffer of its own, so `out` needs room for n floats only.
  void multipliers(uint32_t stream, int64_t row, int64_t column, int64_t n, float* out) const {
    for (int64_t done = 0; done < n; done += kRowDraws) {
      uint32_t draws[kRowDraws];
      row_draws(seed, stream, row, column + done, draws);
      float block[kRowDraws];
      for (int i = 0; i < kRowDraws; ++i) block[i] = draws[i] < threshold ? 0.0f : keep_scale;
      const int64_t count = n - done < kRowDraws ? n - done : kRowDraws;
      std::memcpy(out + done, block, static_cast<size_t>(count) * sizeof(float));
    }
  }

  // body(j, i, dropped): which of the kLanes rows from row + i on drop column + j, for a block of columns and rows.
  template <class Body>
  void draw_across(uint32_t stream, int64_t row, int64_t column, const Body& body) const {
    constexpr int vectors = kBlockRows / kLanes, all = kBlockColumns / 4 * vectors;
    PhiloxBlock<all> draws;
#pragma GCC unroll 4
    for (int n = 0; n < all; ++n) {
      const int64_t first = row + n % vectors * kLanes;
      for (int i = 0; i < kLanes; ++i) {
        draws.word[0][n][i] = static_cast<uint32_t>(static_cast<uint64_t>(first + i) >> 32);
      }
      draws.word[1][n] = U{} + stream;
      draws.word[2][n] = lane_numbers() + static_cast<uint32_t>(first);
      draws.word[3][n] = U{} + static_cast<uint32_t>(column / 4 + n / vectors);
    }
    draws.draw(seed);
#pragma GCC unroll 4
    for (int n = 0; n < all; ++n) {
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) {
        body(n / vectors * 4 + word, n % vectors * kLanes, draws.word[word][n] < threshold);
      }
    }
  }
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
