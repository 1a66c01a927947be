// Intel AMX's tiles, as far as products of bf16 need them: eight registers of 16 rows of 64 bytes, and the instruction
//
//   C (16 x 16 float) += A (16 rows of 32 bf16) B (16 rows of 16 pairs of bf16: rows 2 i and 2 i + 1, interleaved)
//
// Four tiles hold C (two by two), two A and two B. These functions are all that knows the intrinsics; where
// LLMENGINE_AMX_EMULATED is defined, twins in plain C++ stand in their place, so that tests run the kernels above on
// machines without such tiles.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/vec.h"

#if defined(__AMX_BF16__) || defined(LLMENGINE_AMX_EMULATED)
#define LLMENGINE_AMX

namespace llmengine::cpu::LLMENGINE_ISA {

inline constexpr int kAmxRows = 16, kAmxRowBytes = 64;
// tile numbers: C at (i, j) is number 2 i + j
inline constexpr int kAmxA = 4, kAmxB = 6;

#if defined(LLMENGINE_AMX_EMULATED)

struct AmxTile {
  alignas(64) unsigned char bytes[kAmxRows][kAmxRowBytes];
};
inline thread_local AmxTile amx_tiles[8];
inline thread_local bool amx_configured = false;

inline void amx_configure() {
  amx_configured = true;
  std::memset(amx_tiles, 0, sizeof amx_tiles);
}
// What a released tile held is lost: NaN betrays a kernel that goes on without.
inline void amx_release() {
  amx_configured = false;
  std::memset(amx_tiles, 0xff, sizeof amx_tiles);
}
template <int tile>
void amx_zero() {
  std::memset(&amx_tiles[tile], amx_configured ? 0 : 0xff, sizeof(AmxTile));
}
template <int tile>
[[gnu::noinline]] void amx_load(const void* from, int64_t row_bytes) {
  for (int row = 0; row < kAmxRows; ++row) {
    std::memcpy(amx_tiles[tile].bytes[row], static_cast<const char*>(from) + row * row_bytes, kAmxRowBytes);
  }
}
template <int tile>
[[gnu::noinline]] void amx_store(void* to, int64_t row_bytes) {
  for (int row = 0; row < kAmxRows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * row_bytes, amx_tiles[tile].bytes[row], kAmxRowBytes);
  }
}

// The instruction takes denormals for zero, in operands and in results.
inline float amx_flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

// c += a times b. One copy for all callers: a kernel full of them would compile for minutes under sanitizers.
[[gnu::noinline]] inline void amx_multiply_add(AmxTile& c_tile, const AmxTile& a_tile, const AmxTile& b_tile) {
  constexpr int kPairs = kAmxRowBytes / 4;
  float c[kAmxRows][16];
  bf16 a[kAmxRows][2 * kPairs], b[kPairs][32];
  std::memcpy(c, &c_tile, sizeof c);
  std::memcpy(a, &a_tile, sizeof a);
  std::memcpy(b, &b_tile, sizeof b);
  for (int row = 0; row < kAmxRows; ++row) {
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {};  // of the even k and of the odd ones: so the hardware adds, bit for bit
      for (int k = 0; k < 2 * kPairs; ++k) {
        const float x = amx_flushed(widen(a[row][k])), y = amx_flushed(widen(b[k / 2][2 * n + k % 2]));
        sums[k % 2] = amx_flushed(std::fma(x, y, sums[k % 2]));
      }
      c[row][n] = amx_flushed(c[row][n] + amx_flushed(sums[0] + sums[1]));
    }
  }
  std::memcpy(&c_tile, c, sizeof c);
}

template <int c_tile, int a_tile, int b_tile>
void amx_multiply_tiles() {
  amx_multiply_add(amx_tiles[c_tile], amx_tiles[a_tile], amx_tiles[b_tile]);
}

#else

// GCC's intrinsics are assembly that does not say what memory it reads and writes: without these fences (which emit
// nothing) the compiler may keep back a store that a tile is about to load.
inline void amx_memory() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// GCC 12's _tile_loadconfig names only the first eight bytes as its operand, and stores to the rest of a local would be
// dropped: this one is constant.
struct AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};  // of eight tiles: what is beyond must be zero
};
static_assert(sizeof(AmxConfig) == 64);
alignas(64) inline constexpr AmxConfig kAmxConfig{};

inline void amx_configure() {
  amx_memory();
  _tile_loadconfig(&kAmxConfig);
}
inline void amx_release() { _tile_release(); }

// The intrinsics paste their argument into the instruction: it must be a digit.
template <int tile>
void amx_zero() {
  if constexpr (tile == 0) _tile_zero(0);
  if constexpr (tile == 1) _tile_zero(1);
  if constexpr (tile == 2) _tile_zero(2);
  if constexpr (tile == 3) _tile_zero(3);
  if constexpr (tile == 4) _tile_zero(4);
  if constexpr (tile == 5) _tile_zero(5);
}
template <int tile>
void amx_load(const void* from, int64_t row_bytes) {
  amx_memory();
  if constexpr (tile == 0) _tile_loadd(0, from, row_bytes);
  if constexpr (tile == 1) _tile_loadd(1, from, row_bytes);
  if constexpr (tile == 2) _tile_loadd(2, from, row_bytes);
  if constexpr (tile == 3) _tile_loadd(3, from, row_bytes);
  if constexpr (tile == 4) _tile_loadd(4, from, row_bytes);
  if constexpr (tile == 5) _tile_loadd(5, from, row_bytes);
  if constexpr (tile == 6) _tile_loadd(6, from, row_bytes);
  if constexpr (tile == 7) _tile_loadd(7, from, row_bytes);
}
template <int tile>
void amx_store(void* to, int64_t row_bytes) {
  if constexpr (tile == 0) _tile_stored(0, to, row_bytes);
  if constexpr (tile == 1) _tile_stored(1, to, row_bytes);
  if constexpr (tile == 2) _tile_stored(2, to, row_bytes);
  if constexpr (tile == 3) _tile_stored(3, to, row_bytes);
  if constexpr (tile == 4) _tile_stored(4, to, row_bytes);
  if constexpr (tile == 5) _tile_stored(5, to, row_bytes);
  amx_memory();
}
template <int c, int a, int b>
void amx_multiply_tiles() {
  static_assert((a == 4 && b >= 6) || (a == 5 && b >= 6) || (a == 6 && b == 7));
  if constexpr (c == 0 && a == 4 && b == 6) _tile_dpbf16ps(0, 4, 6);
  if constexpr (c == 1 && a == 4 && b == 7) _tile_dpbf16ps(1, 4, 7);
  if constexpr (c == 2 && a == 5 && b == 6) _tile_dpbf16ps(2, 5, 6);
  if constexpr (c == 3 && a == 5 && b == 7) _tile_dpbf16ps(3, 5, 7);
  if constexpr (c == 0 && a == 6) _tile_dpbf16ps(0, 6, 7);
  if constexpr (c == 1 && a == 6) _tile_dpbf16ps(1, 6, 7);
  if constexpr (c == 2 && a == 6) _tile_dpbf16ps(2, 6, 7);
  if constexpr (c == 3 && a == 6) _tile_dpbf16ps(3, 6, 7);
  if constexpr (c == 4 && a == 6) _tile_dpbf16ps(4, 6, 7);
  if constexpr (c == 5 && a == 6) _tile_dpbf16ps(5, 6, 7);
}

#endif

// The product of C (i, j), of the A and the B that it is numbered by.
template <int i, int j>
void amx_multiply() {
  amx_multiply_tiles<2 * i + j, kAmxA + i, kAmxB + j>();
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
#endif
