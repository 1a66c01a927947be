// Dropout multipliers of a run of columns: 0 where the generator of ops/philox.h drops, 1 / (1 - p) elsewhere.
#pragma once

#include "cpu/vec.h"
#include "ops/philox.h"

namespace llmengine::cpu::LLMENGINE_ISA {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float keep_scale = 1.0f;
  bool active = false;

  Dropout(double p, const TensorView& seed_tensor) {
    active = p > 0;
    if (!active) return;
    seed = static_cast<uint64_t>(*seed_tensor.as<int64_t>());
    threshold = ops::drop_threshold(p);
    keep_scale = static_cast<float>(1.0 / (1.0 - p));
  }

  // out[i] for columns [column, column + n) of a row; column is a multiple of 4. Writes up to the next multiple of 4 x
  // kBlock draws into a buffer of its own, so `out` needs room for n floats only.
  void multipliers(uint32_t stream, int64_t row, int64_t column, int64_t n, float* out) const {
    for (int64_t done = 0; done < n; done += 4 * kBlock) {
      Counters c;
      for (int i = 0; i < kBlock; ++i) {
        c[0][i] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
        c[1][i] = stream;
        c[2][i] = static_cast<uint32_t>(row);
        c[3][i] = static_cast<uint32_t>((column + done) / 4 + i);
      }
      draw(c);
      float block[4 * kBlock];
      for (int i = 0; i < kBlock; ++i) {
        for (int word = 0; word < 4; ++word) block[4 * i + word] = c[word][i] < threshold ? 0.0f : keep_scale;
      }
      const int64_t count = n - done < 4 * kBlock ? n - done : 4 * kBlock;
      std::memcpy(out + done, block, static_cast<size_t>(count) * sizeof(float));
    }
  }

  // The same, rows lying across: out[j stride + i] for the four columns column + j and kBlock rows row + i.
  void multipliers_across(uint32_t stream, int64_t row, int64_t column, float* out, int64_t stride) const {
    Counters c;
    for (int i = 0; i < kBlock; ++i) {
      c[0][i] = static_cast<uint32_t>(static_cast<uint64_t>(row + i) >> 32);
      c[1][i] = stream;
      c[2][i] = static_cast<uint32_t>(row + i);
      c[3][i] = static_cast<uint32_t>(column / 4);
    }
    draw(c);
    for (int word = 0; word < 4; ++word) {
      for (int i = 0; i < kBlock; ++i) out[word * stride + i] = c[word][i] < threshold ? 0.0f : keep_scale;
    }
  }

  static constexpr int kBlock = 16;

 private:
  using Counters = uint32_t[4][kBlock];

  // Philox of kBlock counters, word by word: plain loops that the compiler turns into vector code.
  void draw(Counters& c) const {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kBlock; ++i) {
        const uint64_t p0 = static_cast<uint64_t>(ops::kPhiloxM0) * c[0][i];
        const uint64_t p1 = static_cast<uint64_t>(ops::kPhiloxM1) * c[2][i];
        const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1][i] ^ k0;
        const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3][i] ^ k1;
        c[1][i] = static_cast<uint32_t>(p1), c[3][i] = static_cast<uint32_t>(p0);
        c[0][i] = n0, c[2][i] = n2;
      }
      k0 += ops::kPhiloxW0, k1 += ops::kPhiloxW1;
    }
  }
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
