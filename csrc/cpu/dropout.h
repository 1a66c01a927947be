// Dropout multipliers of a run of columns: 0 where the generator of ops/philox.h drops, 1 / (1 - p) elsewhere.
#pragma once

#include "cpu/philox_block.h"

namespace llmengine::cpu::LLMENGINE_ISA {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float keep_scale = 1.0f;
  bool active = false;

  static constexpr int kBlock = 16;

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

  // The same, rows lying across: out[j stride + i] for the four columns column + j and kBlock rows row + i.
  void multipliers_across(uint32_t stream, int64_t row, int64_t column, float* out, int64_t stride) const {
    constexpr int vectors = kBlock / kLanes;
    PhiloxBlock<vectors> draws;
    for (int v = 0; v < vectors; ++v) {
      const int64_t first = row + v * kLanes;
      for (int i = 0; i < kLanes; ++i) {
        draws.word[0][v][i] = static_cast<uint32_t>(static_cast<uint64_t>(first + i) >> 32);
      }
      draws.word[1][v] = U{} + stream;
      draws.word[2][v] = lane_numbers() + static_cast<uint32_t>(first);
      draws.word[3][v] = U{} + static_cast<uint32_t>(column / 4);
    }
    draws.draw(seed);
    for (int word = 0; word < 4; ++word) {
      for (int v = 0; v < vectors; ++v) {
        store(out + word * stride + v * kLanes, select(draws.word[word][v] < threshold, F{}, broadcast(keep_scale)));
      }
    }
  }
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
