// From queries, keys and values to tiles of 8-bit floats (attention_fp8.h).
//
//   A block has a tile, 128 tokens of a head, in registers: 2 D threads 8 x 8 numbers each, D / 8 lanes side by side a
//   token's. Queries and keys are turned there: butterflies of columns 1, 2, 4 apart are a thread's own, those of 8 and
//   more go between lanes. With m the largest magnitude of the tile, of numbers that are finite,
//
//     scale = 2^e, the least that keeps m / 2^e up to 448, and e at least -126        number = x / 2^e, to nearest even
//
//   Powers of two, so that a token's numbers depend on its neighbours only where those are so large that its own leave
//   the format's normal numbers, 2^15 below. In float32, each operation rounded once: all backends have the same bits.
//   An infinity or NaN becomes NaN, of queries and keys in its whole token.
//
//   Queries and keys are stored from registers, 8 bytes a time. Values are transposed through shared memory, two keys
//   of a column at a time, where chunks of 16 bytes change places by the eights of columns, so that they do not meet in
//   a bank.
//
//   bytes   2 a number, and 1
//   limit   memory bandwidth
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/attention_call.h"
#include "cuda/attention_fp8.h"
#include "cuda/attention_logits.cuh"
#include "cuda/launch.cuh"

namespace llmengine::cuda {
namespace attention {
namespace {

constexpr int kSide = 8;  // of a thread's square

enum class Kind : int { query, key, value };

template <class T>
struct Tokens {
  Operand<const T> x;
  Sizes sizes;  // of tokens as rows
  uint8_t* numbers;
  float* scales;
};

template <int D>
struct Shared {
  float of_warps[2 * D / 32];
  uint4 transposed[D][kByteRows / 16];
};

__device__ __forceinline__ float finite_magnitude(float x) {
  const float magnitude = fabsf(x);
  return magnitude <= FLT_MAX ? magnitude : 0.0f;
}

__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// The least e with `largest` <= 448 2^e: 448 is 1.75 2^8.
__device__ __forceinline__ int exponent_of_scale(float largest) {
  const int above = static_cast<int>((__float_as_uint(largest) + 0x1fffffu) >> 23) - 127 - 8;
  return above < -126 ? -126 : above;
}

template <int D>
__device__ __forceinline__ void turn_rows(float (&x)[kSide][kSide], int column) {
#pragma unroll
  for (int c = 0; c < kSide; ++c) {
    const float sign = is_negated(column + c) ? -1.0f : 1.0f;
#pragma unroll
    for (int r = 0; r < kSide; ++r) x[r][c] *= sign;
  }
#pragma unroll
  for (int apart = 1; apart < kSide; apart *= 2)
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      if (c & apart) continue;
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
        const float upper = x[r][c], lower = x[r][c + apart];
        x[r][c] = upper + lower, x[r][c + apart] = upper - lower;
      }
    }
#pragma unroll
  for (int lanes = 1; lanes < D / kSide; lanes *= 2) {
    const bool second = lane_of() & lanes;
#pragma unroll
    for (int r = 0; r < kSide; ++r)
#pragma unroll
      for (int c = 0; c < kSide; ++c) {
        const float other = __shfl_xor_sync(kWholeWarp, x[r][c], lanes);
        x[r][c] = second ? other - x[r][c] : x[r][c] + other;
      }
  }
}

template <int D>
__device__ __forceinline__ float largest_of_tile(const float (&x)[kSide][kSide], Shared<D>& shared) {
  float largest[1] = {0.0f};
#pragma unroll
  for (int r = 0; r < kSide; ++r)
#pragma unroll
    for (int c = 0; c < kSide; ++c) largest[0] = fmaxf(largest[0], finite_magnitude(x[r][c]));
  warp_reduce<Max>(largest);
  if (lane_of() == 0) shared.of_warps[warp_of()] = largest[0];
  __syncthreads();
#pragma unroll
  for (float of_warp : shared.of_warps) largest[0] = fmaxf(largest[0], of_warp);
  return largest[0];
}

__device__ __forceinline__ uint32_t pair_of_bytes(float a, float b, float inverse) {
  const auto scaled = [&](float x) { return fabsf(x) <= FLT_MAX ? x * inverse : NAN; };
  return ptx::e4m3x2_of(scaled(a), scaled(b));
}

// Where a chunk of 16 bytes of a row of `span`, 64 or 128, lies in it.
__device__ __forceinline__ int swizzled(int chunk, int row, int span) {
  return chunk ^ (span == 128 ? row % 8 : row / 2 % 4);
}

// Rows of panels, as many at a time.
template <int D>
__device__ __forceinline__ void store_rows_of_bytes(const float (&x)[kSide][kSide], float inverse, int first,
                                                    int column, int at_a_time, uint8_t* tile) {
  constexpr int span = D < 128 ? D : 128;
  const int panel = column / span, chunk = column % span / 16;
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    const int row = first + r;
    const uint2 bytes =
        make_uint2(pair_of_bytes(x[r][0], x[r][1], inverse) | pair_of_bytes(x[r][2], x[r][3], inverse) << 16,
                   pair_of_bytes(x[r][4], x[r][5], inverse) | pair_of_bytes(x[r][6], x[r][7], inverse) << 16);
    const int offset = row / at_a_time * at_a_time * D + (panel * at_a_time + row % at_a_time) * span;
    ptx::store_8(tile + offset + swizzled(chunk, row, span) * 16 + column % 16, bytes);
  }
}

// Columns as rows of keys, those of a step at a time.
template <int D>
__device__ __forceinline__ void store_columns_of_bytes(const float (&x)[kSide][kSide], float inverse, int first,
                                                       int column, Shared<D>& shared, uint8_t* tile) {
#pragma unroll
  for (int c = 0; c < kSide; ++c) {
    const int chunk = first / 16 ^ column / kSide % 8;
    auto* to = reinterpret_cast<uint8_t*>(&shared.transposed[column + c][chunk]);
#pragma unroll
    for (int r = 0; r < kSide; r += 2)
      *reinterpret_cast<uint16_t*>(to + place_of_key(first % 16 + r)) =
          static_cast<uint16_t>(pair_of_bytes(x[r][c], x[r + 1][c], inverse));
  }
  __syncthreads();
  constexpr int span = keys_of_step(D), kChunks = span / 16;
  for (int i = static_cast<int>(threadIdx.x); i < D * 8; i += 2 * D) {
    const int row = i / 8, chunk = i % 8;
    const int offset = chunk / kChunks * (span * D) + row * span;
    ptx::store_16(tile + offset + swizzled(chunk % kChunks, row, span) * 16,
                  shared.transposed[row][chunk ^ row / kSide % 8]);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(2 * D) attention_fp8_quantise(const Tokens<T> p, const Kind kind) {
  __shared__ Shared<D> shared;
  const Sizes& sizes = p.sizes;
  const int number = static_cast<int>(blockIdx.x), head = number % sizes.heads;
  const Spot spot = spot_of(sizes, false, number / sizes.heads, kByteRows, false);
  const Cut cut = cut_of(sizes.cu_seqlens_q, spot.sequence, sizes.sequences, sizes.rows);
  const int token = spot.tile * kByteRows, count = cut.count - token;
  if (token < 0 || count <= 0) return;
  const auto lines = p.x.lines(sizes.cu_seqlens_q ? 0 : spot.sequence, head, cut.first + token);
  const int column = static_cast<int>(threadIdx.x) % (D / kSide) * kSide;
  const int first = static_cast<int>(threadIdx.x) / (D / kSide) * kSide;
  float x[kSide][kSide];
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    const int columns = first + r < count ? lines.columns : 0;
    load_floats(lines.data + (first + r) * lines.stride, column, columns, lines.aligned, x[r]);
  }
  if (kind != Kind::value) turn_rows<D>(x, column);
  const int exponent = exponent_of_scale(largest_of_tile<D>(x, shared));
  if (threadIdx.x == 0) p.scales[number] = power_of_two(exponent);
  uint8_t* to = p.numbers + static_cast<int64_t>(number) * (kByteRows * D);
  const float inverse = power_of_two(-exponent);
  kind == Kind::value
      ? store_columns_of_bytes<D>(x, inverse, first, column, shared, to)
      : store_rows_of_bytes<D>(x, inverse, first, column, kind == Kind::query ? 64 : keys_of_step(D), to);
}

Kind kind_of(const std::string& operand) {
  return operand == "query" ? Kind::query : operand == "key" ? Kind::key : Kind::value;
}

}  // namespace
}  // namespace attention

void validate(const AttentionFp8Quantise& p) {
  const Checker at{"attention_fp8_quantise"};
  at.defined(p.x, "x");
  at.dtype(p.x, "x", attention::kOperandTypes);
  if (p.x.ndim != 4) at.fail_at("x", "must be (batch, heads, tokens, head_dim), got " + p.x.shape());
  at.unit_last_stride(p.x, "x");
  at.dtype(p.cu_seqlens, "cu_seqlens", {DType::i32});
  at.contiguous(p.cu_seqlens, "cu_seqlens");
  if (p.operand != "query" && p.operand != "key" && p.operand != "value") {
    at.fail_at("operand", "is '" + p.operand + "'; allowed: 'query', 'key', 'value'");
  }
  at.defined(p.numbers, "numbers");
  const int64_t columns = p.numbers.size(p.numbers.ndim - 1) / attention::kByteRows;
  if (columns != 64 && columns != 128 && columns != 256) {
    at.fail_at("numbers", "has shape " + p.numbers.shape() + "; expected 128 times 64, 128 or 256 bytes a tile");
  }
  attention::check_tiles(at, p.numbers, "numbers", p.scales, "scales", p.x, p.cu_seqlens, static_cast<int>(columns));
}

void run(const AttentionFp8Quantise& p, Stream stream) {
  using namespace attention;
  check_is_hopper("attention_fp8_quantise");
  if (p.x.numel() == 0) return;
  const int64_t sequences = p.cu_seqlens.defined() ? p.cu_seqlens.size(0) - 1 : p.x.size(0);
  const int64_t blocks = sequences > 0 ? byte_tiles_of(p.x, p.cu_seqlens) * p.x.size(1) : 0;
  check(p.x.size(2) <= kMostTokens && blocks <= std::numeric_limits<int>::max(),
        "attention_fp8_quantise: x " + p.x.shape() + " has more tokens or tiles than are supported on CUDA");
  const auto quantise = [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const auto tokens = static_cast<int>(p.x.size(2)), heads = static_cast<int>(p.x.size(1));
    const Sizes sizes{p.cu_seqlens.as<const int32_t>(),
                      nullptr,
                      (tokens + kByteRows - 1) / kByteRows,
                      heads,
                      1,
                      static_cast<int>(sequences),
                      tokens,
                      0};
    const Tokens<T> given{operand_of<const T>(p.x), sizes, p.numbers.as<uint8_t>(), p.scales.as<float>()};
    launch({"attention_fp8_quantise", dim3(static_cast<unsigned>(blocks)), dim3(2 * D), cuda_stream(stream), p.x},
           attention_fp8_quantise<T, D>, given, kind_of(p.operand));
  };
  visit_at_least<64, 128, 256>(static_cast<int>(p.numbers.size(2) / kByteRows), [&](auto dim) {
    p.x.dtype == DType::bf16 ? quantise(bf16{}, dim) : quantise(f16{}, dim);
  });
}

}  // namespace llmengine::cuda
