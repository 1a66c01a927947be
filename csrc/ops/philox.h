// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the engine's only generator.
//
//   key     = the operator's 64-bit seed                (two words, low first)
//   counter = (row >> 32, stream, row, column / 4)      stream: batch x heads + head for attention, 0 elsewhere
//   draw    = word (column mod 4) of the result;        an element is dropped when draw < p x 2^32
//
// A draw depends on the element's place alone, so every backend, layout and tile shape drops the same elements,
// and a backward pass replays them from the seed.
#pragma once

#include <cstdint>

namespace llmengine::ops {

struct Philox4 {
  uint32_t word[4];
};

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

constexpr Philox4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1), c3 = static_cast<uint32_t>(p0);
    c0 = n0, c2 = n2;
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The draws below this are dropped. p < 1 is checked before.
constexpr uint32_t drop_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace llmengine::ops
