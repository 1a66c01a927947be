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
    // kBlock counters at a time, word by word: plain loops that the compiler turns into vector code.
    constexpr int kBlock = 16;
    for (int64_t done = 0; done < n; done += 4 * kBlock) {
      uint32_t c0[kBlock], c1[kBlock], c2[kBlock], c3[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        c0[i] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
        c1[i] = stream;
        c2[i] = static_cast<uint32_t>(row);
        c3[i] = static_cast<uint32_t>((column + done) / 4 + i);
      }
      uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kBlock; ++i) {
          const uint64_t p0 = static_cast<uint64_t>(ops::kPhiloxM0) * c0[i];
          const uint64_t p1 = static_cast<uint64_t>(ops::kPhiloxM1) * c2[i];
          const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
          const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
          c1[i] = static_cast<uint32_t>(p1), c3[i] = static_cast<uint32_t>(p0);
          c0[i] = n0, c2[i] = n2;
        }
        k0 += ops::kPhiloxW0, k1 += ops::kPhiloxW1;
      }
      float block[4 * kBlock];
      for (int i = 0; i < kBlock; ++i) {
        block[4 * i + 0] = c0[i] < threshold ? 0.0f : keep_scale;
        block[4 * i + 1] = c1[i] < threshold ? 0.0f : keep_scale;
        block[4 * i + 2] = c2[i] < threshold ? 0.0f : keep_scale;
        block[4 * i + 3] = c3[i] < threshold ? 0.0f : keep_scale;
      }
      const int64_t count = n - done < 4 * kBlock ? n - done : 4 * kBlock;
      std::memcpy(out + done, block, static_cast<size_t>(count) * sizeof(float));
    }
  }
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
