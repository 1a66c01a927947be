// The generator of ops/philox.h for many counters at once: a vector holds one word of kLanes counters.
#pragma once

#include "cpu/vec.h"
#include "ops/philox.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// Several vectors go through the rounds together: each waits for its own products some ten cycles a round.
template <int vectors>
struct PhiloxBlock {
  U word[4][vectors];  // the counters, and after draw() their random words

  void draw(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4  // so that words stay in registers
      for (int v = 0; v < vectors; ++v) {
        const Product p0 = multiply(word[0][v], ops::kPhiloxM0), p1 = multiply(word[2][v], ops::kPhiloxM1);
        word[0][v] = p1.high ^ word[1][v] ^ k0, word[1][v] = p1.low;
        word[2][v] = p0.high ^ word[3][v] ^ k1, word[3][v] = p0.low;
      }
      k0 += ops::kPhiloxW0, k1 += ops::kPhiloxW1;
    }
  }
};

// The random words of kRowDraws columns of a row, in their order; the first column is a multiple of 4.
inline constexpr int kRowVectors = kLanes == 16 ? 4 : 2;  // as registers allow
inline constexpr int kRowDraws = 4 * kLanes * kRowVectors;

inline void row_draws(uint64_t seed, uint32_t stream, int64_t row, int64_t column, uint32_t* out) {
  PhiloxBlock<kRowVectors> block;
#pragma GCC unroll 4
  for (int v = 0; v < kRowVectors; ++v) {
    block.word[0][v] = U{} + static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
    block.word[1][v] = U{} + stream;
    block.word[2][v] = U{} + static_cast<uint32_t>(row);
    block.word[3][v] = lane_numbers() + static_cast<uint32_t>(column / 4 + v * kLanes);
  }
  block.draw(seed);
#pragma GCC unroll 4
  for (int v = 0; v < kRowVectors; ++v) {
    const Pair even = zip(block.word[0][v], block.word[2][v]), odd = zip(block.word[1][v], block.word[3][v]);
    const Pair front = zip(even.first, odd.first), back = zip(even.second, odd.second);
    const U in_order[4] = {front.first, front.second, back.first, back.second};
    std::memcpy(out + 4 * kLanes * v, in_order, sizeof in_order);
  }
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
