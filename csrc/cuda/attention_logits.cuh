// What the attention kernels share, those for every GPU from sm_80 on, Hopper's (attention_sm90a_*.cu) and the one over
// a cache (decode_attention.cu): where a block's sequence, rows and keys lie, and what stands between query key^T and
// the probabilities (ops/attention.h, ops/attention_band.h).
//
//   Logits are kept as products where they are positive multiples of those ("plain": scale > 0, no softcap, bias or
//   mask): P = exp2(x factor - base) is one multiply-add and one exponential, with base, the maximum or lse, in units
//   of log 2. Else they are natural, and P = exp2((x - shift) factor - base), with the maximum, or lse, as shift and
//   what rounding took from lse as base. Biases may be as large as floats are: a difference of logits is exact, or
//   small beside them, where a rounded multiple of one is off by as much as other logits are apart.
//
//   Tiles of scores lie in accumulators (matrix_tile.cuh) as (rows, keys), or `transposed` as (keys, rows). `first` is
//   the row, or key, of the accumulators' first row, `across` the key, or row, of their first column.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/attention_places.h"
#include "cuda/attention_schedule.h"
#include "cuda/dropout.cuh"
#include "cuda/maths.cuh"
#include "cuda/matrix_tile.cuh"
#include "cuda/reduce.cuh"
#include "ops/attention_band.h"

namespace llmengine::cuda::attention {

inline constexpr int kThreads = 128, kWarps = kThreads / 32;
inline constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int largest(int a, int b) { return a < b ? b : a; }

// ---- arguments ------------------------------------------------------------------------------------------------------

// A (batch, heads, rows, columns) tensor with unit last stride.
template <class T>
struct Operand {
  T* data;
  int64_t batch, head, row;
  int columns;
  bool aligned;

  __device__ Lines<T> lines(int64_t b, int h, int64_t r) const {
    return {data + b * batch + h * head + r * row, row, columns, aligned};
  }
};

// Strides are 0 along what it is broadcast along.
struct Mask {
  enum Kind : int { none, boolean, floats, operands };

  const void* data;
  int64_t batch, head, row, key;
  Kind kind;
};

struct Options {
  Mask mask;
  const float* slopes;  // (sequences, heads) with these strides, or null
  int64_t slope_sequence, slope_head;
  const float* distances;  // (heads, 2 farthest + 1), or null
  int farthest;
  const float* sinks;  // (heads,), or null
  int left, right;
  bool bottom_right;
  float scale, factor, softcap;
  Dropout dropout;
};

// Tokens behind the last boundary of packed sequences are sequence number `sequences`; its rows see no key.
struct Sizes {
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // null: every batch entry is a sequence
  int tiles;                                   // of the longest sequence
  int heads, group, sequences, rows, keys;
};

// ---- place ----------------------------------------------------------------------------------------------------------

struct Place {
  int tile, head, sequence;  // head: of those that own tiles
};

// For kernels whose tiles are all alike.
__device__ __forceinline__ Place place_of(int tiles, int heads) {
  const int block = static_cast<int>(blockIdx.x);
  return {block % tiles, block / tiles % heads, block / tiles / heads};
}

struct Cut {
  int first, count;
};

// Wrong boundaries are clamped: a kernel cannot refuse them.
__device__ __forceinline__ Cut cut_of(const int32_t* boundaries, int sequence, int sequences, int tokens) {
  if (!boundaries) return {0, tokens};
  const int first = least(largest(boundaries[sequence], 0), tokens);
  const int end = sequence < sequences ? least(largest(boundaries[sequence + 1], first), tokens) : tokens;
  return {first, end - first};
}

struct Sequence {
  int64_t batch;
  int index, row0, rows, key0, keys;

  __device__ ops::BandOf<int> band(const Options& o) const { return {rows, keys, o.left, o.right, o.bottom_right}; }
};

__device__ __forceinline__ Sequence sequence_of(const Sizes& s, int index) {
  const Cut rows = cut_of(s.cu_seqlens_q, index, s.sequences, s.rows);
  const Cut keys = cut_of(s.cu_seqlens_k, index, s.sequences, s.keys);
  return {s.cu_seqlens_q ? 0 : index, index, rows.first, rows.count, keys.first, keys.count};
}

// What a place holds (attention_places.h): the tile of a sequence, which an empty one's lies outside of. `rest`: packed
// tokens behind the last sequence have places, too.
struct Spot {
  int tile, sequence;
};

__device__ __forceinline__ Spot spot_of(const Sizes& sizes, bool keys, int place, int lines, bool rest) {
  const int32_t* boundaries = keys ? sizes.cu_seqlens_k : sizes.cu_seqlens_q;
  if (!boundaries) return {place % sizes.tiles, place / sizes.tiles};
  const auto first = [&](int sequence) {
    return cut_of(boundaries, sequence, sizes.sequences, keys ? sizes.keys : sizes.rows).first;
  };
  const int sequence = sequence_of_place(place, sizes.sequences + rest, lines, first);
  return {place - first_place(sequence, first(sequence), 0, lines, true), sequence};
}

// For sm_80's blocks, one for every tile. `heads`: that own tiles, of keys or of rows.
__device__ __forceinline__ Place place_of(const Schedule& schedule, const Sizes& sizes, bool keys, int heads,
                                          int lines) {
  const auto [place, owner] = schedule.at(static_cast<int>(blockIdx.x));
  if (!sizes.cu_seqlens_q) return {place, owner % heads, owner / heads};
  const Spot spot = spot_of(sizes, keys, place, lines, true);
  return {spot.tile, owner, spot.sequence};
}

using Span = ops::SpanOf<int>;
using Band = ops::BandOf<int>;

// The keys that rows [first, first + count) see, but for rows past the last; the rows that see such keys.
__device__ __forceinline__ Span keys_of_rows(const Band& band, int first, int count) {
  return band.keys_of(first, least(first + count, band.rows));
}
__device__ __forceinline__ Span rows_of_keys(const Band& band, int first, int count) {
  return band.rows_of(first, least(first + count, band.keys));
}

// Where a walk in tiles through what a tile sees begins; at its end, where it sees nothing.
__device__ __forceinline__ int begin_of_walk(const Span& seen, int tile) {
  return seen.begin < seen.end ? seen.begin / tile * tile : seen.end;
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// -inf where a key is not seen.
template <bool transposed, int blocks, int n>
__device__ __forceinline__ void hide_unseen(float (&x)[blocks][n][4], const Band& band, int first, int across) {
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = first + 16 * m + 8 * half + lane_of() / 4;
      const int begin = transposed ? band.first_row(line) : band.begin(line);
      const int end = transposed ? band.last_row(line) : band.end(line);
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int column = across + 8 * j + lane_of() % 4 * 2 + i % 2;
          if (column < begin || column >= end) x[m][j][i] = -INFINITY;
        }
    }
}

// Keeps its relative error within 2^-21 of the cap, which is what the logits need.
__device__ __forceinline__ float tanh_of(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// A key whose bias is -inf is not seen, whatever its score: NaN in padding stays there.
__device__ __forceinline__ float biased(float x, float bias) { return bias == -INFINITY ? bias : x + bias; }

template <class T>
__device__ __forceinline__ float mask_value(const Mask& mask, int64_t place) {
  if (mask.kind == Mask::boolean) return static_cast<const uint8_t*>(mask.data)[place] ? 0.0f : -INFINITY;
  if (mask.kind == Mask::floats) return static_cast<const float*>(mask.data)[place];
  return to_float(static_cast<const T*>(mask.data)[place]);
}

// Products to logits, but for what hide_unseen() does.
template <class T, bool transposed, int blocks, int n>
__device__ __forceinline__ void make_logits(float (&x)[blocks][n][4], const Options& o, const Sequence& s, int head,
                                            int first, int across) {
  if (o.softcap > 0.0f) {
    const float by = o.scale / o.softcap;
    each(x, [&](float& u, int, int) { u = o.softcap * tanh_of(u * by); });
  } else {
    each(x, [&](float& u, int, int) { u *= o.scale; });
  }
  const int shift = o.bottom_right ? s.keys - s.rows : 0;
  const int corner = transposed ? first - across - shift : across - first - shift;  // key - position, at the corner
  if (o.slopes) {
    const float slope = o.slopes[s.index * o.slope_sequence + head * o.slope_head];
    each(x, [&](float& u, int r, int c) {
      const int distance = transposed ? corner + r - c : corner + c - r;
      u -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    });
  }
  if (o.distances) {
    const float* middle = o.distances + head * (2 * static_cast<int64_t>(o.farthest) + 1) + o.farthest;
    each(x, [&](float& u, int r, int c) {
      const int distance = transposed ? corner + r - c : corner + c - r;
      u = biased(u, middle[least(largest(distance, -o.farthest), o.farthest)]);
    });
  }
  if (o.mask.kind != Mask::none) {
    const int64_t start = s.batch * o.mask.batch + head * o.mask.head;
    each(x, [&](float& u, int r, int c) {
      const int row = transposed ? across + c : first + r, key = transposed ? first + r : across + c;
      if (row < s.rows && key < s.keys)
        u = biased(u, mask_value<T>(o.mask, start + row * o.mask.row + key * o.mask.key));
    });
  }
}

// ---- dropout --------------------------------------------------------------------------------------------------------

// Which scores of a tile are dropped: bit 4 (j mod 8) + i of word (m, j / 8) for element i of block (m, j).
template <int blocks, int n>
struct Dropped {
  uint32_t words[blocks][(n + 7) / 8];

  __device__ __forceinline__ bool at(int m, int j, int i) const { return words[m][j / 8] >> (4 * (j % 8) + i) & 1; }
};

// Four keys of a row share a draw: every lane draws once per four scores of its own, and lanes exchange which of them
// are dropped. The first key is a multiple of 4. `at_once`: as many rounds of a loop are one; more are quicker, but the
// generator's constants for all of them want registers.
template <bool transposed, int blocks, int n, int at_once = 8>
__device__ __forceinline__ Dropped<blocks, n> draw(const Dropout& dropout, uint32_t stream, int first, int across) {
  const int g = lane_of() / 4, t = lane_of() % 4;
  const auto seed = static_cast<uint64_t>(*dropout.seed);
  const auto draw_four = [&](int row, int key) {
    const ops::Philox4 draws = ops::philox(seed, 0, stream, static_cast<uint32_t>(row), static_cast<uint32_t>(key) / 4);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(draws.word[i] < dropout.threshold) << i;
    return bits;
  };
  Dropped<blocks, n> dropped{};
#pragma unroll at_once
  for (int shift = 0; shift < 4 * (n < 8 ? n : 8); shift += 4)
#pragma unroll
    for (int word = 0; word < (n + 7) / 8; ++word)
#pragma unroll
      for (int m = 0; m < blocks; ++m) {
        const int j = 8 * word + shift / 4;
        if (j >= n) continue;
        uint32_t four = 0;  // of block (m, j), in the lowest bits
        if constexpr (transposed) {
          // keys 4 (g / 4) ... + 3, and 8 more, of rows 2 t and 2 t + 1 are four draws: one for each lane of those keys
          const int own = g % 4;
          const uint32_t bits = draw_four(across + 8 * j + 2 * t + own % 2, first + 16 * m + own / 2 * 8 + g / 4 * 4);
          uint32_t all = bits << (4 * own);
          all |= __shfl_xor_sync(kWholeWarp, all, 4);
          all |= __shfl_xor_sync(kWholeWarp, all, 8);
#pragma unroll
          for (int i = 0; i < 4; ++i) four |= (all >> (4 * i + own) & 1) << i;
        } else {
          // rows g and g + 8 of keys 4 (t / 2) ... + 3 are two draws: the even lane has the upper row's
          const int odd = t % 2;
          const uint32_t bits = draw_four(first + 16 * m + 8 * odd + g, across + 8 * j + t / 2 * 4);
          const uint32_t others = __shfl_xor_sync(kWholeWarp, bits, 1);
          const uint32_t upper = odd ? others : bits, lower = odd ? bits : others;
          four = (upper >> (2 * odd) & 3) | (lower >> (2 * odd) & 3) << 2;
        }
        dropped.words[m][word] |= four << shift;
      }
  return dropped;
}

// `x` times `kept` where it is not dropped, else 0.
template <int blocks, int n>
__device__ __forceinline__ void drop(float (&x)[blocks][n][4], const Dropped<blocks, n>& dropped, float kept) {
#pragma unroll
  for (int m = 0; m < blocks; ++m)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][j][i] = dropped.at(m, j, i) ? 0.0f : x[m][j][i] * kept;
}

}  // namespace llmengine::cuda::attention
