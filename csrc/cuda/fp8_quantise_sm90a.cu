// From floats to 8-bit floats and their scales, and those of the transpose (fp8.h): wgmma multiplies 8-bit numbers only
// along k, and gradients have their k where the forward has lines.
//
//   A block has 128 x 128 numbers in registers, 256 threads 8 x 8 each: half a warp 8 lines of 128 columns. With m the
//   largest magnitude of a scale's numbers, of those that are finite, and not less than 2^-110,
//
//     scale = m / most        number = x (most / m), rounded to nearest even; what rounds beyond `most` becomes it
//
//   in float32, each operation rounded once: every backend has the same bits. An infinity or NaN becomes NaN, so that a
//   product shows it. Of a matrix with one scale a pass ahead finds the largest; each warp then finds that of the
//   parts. Rows are stored as they lie; of the transpose, bytes go through shared memory, whose chunks of 16 bytes
//   trade places (by the eights of columns), so that neither side's meet in a bank.
//
//   bytes   x once (twice with one scale), and 1 a number, and 1 more where both are wanted
//   limit   memory bandwidth
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <string>

#include "cuda/dispatch.h"
#include "cuda/fp8.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 128;            // lines and columns of a block
constexpr int kSide = 8;              // of a thread's square
constexpr int kHalves = 2 * kWarps;   // half warps, one below the other
constexpr float kLeast = 0x1p-110f;   // so that neither m / most nor most / m leaves float32's normal numbers
constexpr int64_t kMostMaxima = 512;  // blocks that look for them: enough loads under way

struct E4m3 {
  static constexpr float kMost = 448.0f;
  __device__ static uint32_t pair(float low, float high) { return ptx::e4m3x2_of(low, high); }
};
struct E5m2 {
  static constexpr float kMost = 57344.0f;
  __device__ static uint32_t pair(float low, float high) { return ptx::e5m2x2_of(low, high); }
};

__device__ __forceinline__ float finite_magnitude(float x) {
  const float magnitude = fabsf(x);
  return magnitude <= FLT_MAX ? magnitude : 0.0f;
}

template <class Format>
struct Scale {
  float value, inverse;

  __device__ explicit Scale(float largest)
      : value(fmaxf(largest, kLeast) / Format::kMost), inverse(Format::kMost / fmaxf(largest, kLeast)) {}
  __device__ float operator()(float x) const { return fabsf(x) <= FLT_MAX ? x * inverse : NAN; }
};

// Bytes of four numbers.
template <class Format>
__device__ __forceinline__ uint32_t word_of(float a, float b, float c, float d) {
  return Format::pair(a, b) | Format::pair(c, d) << 16;
}

// ---- the largest of a matrix ----------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    fp8_maxima(const Rows<const T> x, int64_t lines, int columns, float* maxima) {
  __shared__ RowSlots<1, kWarps> slots;
  constexpr int n = kLanes<T>;
  float largest[1] = {0.0f};
  for (int64_t line = blockIdx.x; line < lines; line += gridDim.x) {
    for (int column = static_cast<int>(threadIdx.x) * n; column < columns; column += kThreads * n) {
      float part[n];
      unpack<T>(load_vector(x[line], column, columns, x.aligned, false), part);
#pragma unroll
      for (int i = 0; i < n; ++i) largest[0] = fmaxf(largest[0], finite_magnitude(part[i]));
    }
  }
  int turn = 0;
  row_reduce<Max>(largest, slots, turn);
  if (threadIdx.x == 0) maxima[blockIdx.x] = largest[0];
}

// ---- numbers and scales ---------------------------------------------------------------------------------------------

struct Target {
  uint8_t* bytes = nullptr;  // null: not wanted
  int64_t stride = 0;
  float* scales = nullptr;
};

struct Whole {
  int lines, columns, block;
  const float* maxima;  // where one scale serves all
  int parts;
  Target rows, transposed;
};

struct Shared {
  float of_halves[kHalves][kTile];  // largest of a column, or of all
  float of_columns[kTile];
  uint4 transposed[kTile][kTile / 16];
};

// The square of a thread, and where it lies in the tile.
struct Square {
  int line, column;  // of the tile
  float x[kSide][kSide];

  __device__ Square() {
    const int t = static_cast<int>(threadIdx.x);
    line = t / 16 * kSide, column = t % 16 * kSide;
  }
  __device__ float largest() const {
    float found = 0.0f;
#pragma unroll
    for (int r = 0; r < kSide; ++r)
#pragma unroll
      for (int c = 0; c < kSide; ++c) found = fmaxf(found, finite_magnitude(x[r][c]));
    return found;
  }
};

__device__ __forceinline__ float largest_of_parts(const float* maxima, int parts) {
  float largest[1] = {0.0f};
  for (int i = static_cast<int>(threadIdx.x) % 32; i < parts; i += 32) largest[0] = fmaxf(largest[0], maxima[i]);
  warp_reduce<Max>(largest);
  return largest[0];
}

__device__ __forceinline__ float largest_of_tile(const Square& square, Shared& shared) {
  float largest[1] = {square.largest()};
  warp_reduce<Max>(largest);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) shared.of_halves[0][warp] = largest[0];
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest[0] = fmaxf(largest[0], shared.of_halves[0][w]);
  return largest[0];
}

// Of each of the thread's lines, over the tile's columns.
__device__ __forceinline__ void largest_of_lines(const Square& square, float (&largest)[kSide]) {
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    largest[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < kSide; ++c) largest[r] = fmaxf(largest[r], finite_magnitude(square.x[r][c]));
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2)
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kWholeWarp, largest[r], lanes));
  }
}

// Of each of the thread's columns, over the tile's lines.
__device__ __forceinline__ void largest_of_columns(const Square& square, Shared& shared, float (&largest)[kSide]) {
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int c = 0; c < kSide; ++c) {
    float of_half = 0.0f;
#pragma unroll
    for (int r = 0; r < kSide; ++r) of_half = fmaxf(of_half, finite_magnitude(square.x[r][c]));
    shared.of_halves[t / 16][square.column + c] = of_half;
  }
  __syncthreads();
  if (t < kTile) {
    float of_column = 0.0f;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) of_column = fmaxf(of_column, shared.of_halves[half][t]);
    shared.of_columns[t] = of_column;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kSide; ++c) largest[c] = shared.of_columns[square.column + c];
}

template <class Format>
__device__ __forceinline__ void store_rows(const Square& square, const Scale<Format>& scale, int r, int line,
                                           int column, const Whole& p) {
  if (line >= p.lines || column >= p.rows.stride) return;
  const float (&x)[kSide] = square.x[r];
  const uint2 bytes = make_uint2(word_of<Format>(scale(x[0]), scale(x[1]), scale(x[2]), scale(x[3])),
                                 word_of<Format>(scale(x[4]), scale(x[5]), scale(x[6]), scale(x[7])));
  ptx::store_8(p.rows.bytes + line * p.rows.stride + column, bytes);
}

// Eight lines of a column: half of a chunk.
template <class Format>
__device__ __forceinline__ void put_column(const Square& square, const Scale<Format>& scale, int c, Shared& shared) {
  const float (&x)[kSide][kSide] = square.x;
  const int column = square.column + c, chunk = square.line / 16 ^ square.column / kSide % 8;
  auto* to = reinterpret_cast<uint2*>(&shared.transposed[column][chunk]) + square.line / kSide % 2;
  *to = make_uint2(word_of<Format>(scale(x[0][c]), scale(x[1][c]), scale(x[2][c]), scale(x[3][c])),
                   word_of<Format>(scale(x[4][c]), scale(x[5][c]), scale(x[6][c]), scale(x[7][c])));
}

__device__ __forceinline__ void store_transposed(const Shared& shared, int first_line, int first_column,
                                                 const Whole& p) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile / 16; i += kThreads) {
    const int column = i / 8, chunk = i % 8, line = first_line + chunk * 16;
    if (first_column + column >= p.columns || line >= p.transposed.stride) continue;
    ptx::store_16(p.transposed.bytes + (first_column + column) * p.transposed.stride + line,
                  shared.transposed[column][chunk ^ column / kSide % 8]);
  }
}

template <class T, class Format>
__global__ void __launch_bounds__(kThreads) fp8_quantise(const Rows<const T> x, const Whole p) {
  __shared__ Shared shared;
  const int column_tiles = (p.columns + kTile - 1) / kTile, line_tiles = (p.lines + kTile - 1) / kTile;
  const int line_tile = static_cast<int>(blockIdx.x) / column_tiles;
  const int column_tile = static_cast<int>(blockIdx.x) - line_tile * column_tiles;
  const int first_line = line_tile * kTile, first_column = column_tile * kTile;
  Square square;
  const int line = first_line + square.line, column = first_column + square.column;
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    if (line + r < p.lines) {
      load_floats(x[line + r], column, p.columns, x.aligned, square.x[r]);
    } else {
#pragma unroll
      for (int c = 0; c < kSide; ++c) square.x[r][c] = 0.0f;
    }
  }
  if (p.block == 1) {
    float largest[kSide];
    if (p.rows.bytes) {
      largest_of_lines(square, largest);
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
        const Scale<Format> scale(largest[r]);
        store_rows(square, scale, r, line + r, column, p);
        if (threadIdx.x % 16 == 0 && line + r < p.lines)
          p.rows.scales[static_cast<int64_t>(column_tile) * p.lines + line + r] = scale.value;
      }
    }
    if (!p.transposed.bytes) return;
    largest_of_columns(square, shared, largest);
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      const Scale<Format> scale(largest[c]);
      put_column(square, scale, c, shared);
      if (square.line == 0 && column + c < p.columns)
        p.transposed.scales[static_cast<int64_t>(line_tile) * p.columns + column + c] = scale.value;
    }
  } else {
    const Scale<Format> scale(p.block == 0 ? largest_of_parts(p.maxima, p.parts) : largest_of_tile(square, shared));
    const bool one = p.block == 0;
    if (p.rows.bytes) {
#pragma unroll
      for (int r = 0; r < kSide; ++r) store_rows(square, scale, r, line + r, column, p);
      if (threadIdx.x == 0 && (!one || blockIdx.x == 0))
        p.rows.scales[one ? 0 : static_cast<int64_t>(column_tile) * line_tiles + line_tile] = scale.value;
    }
    if (!p.transposed.bytes) return;
#pragma unroll
    for (int c = 0; c < kSide; ++c) put_column(square, scale, c, shared);
    if (threadIdx.x == 0 && (!one || blockIdx.x == 0)) p.transposed.scales[one ? 0 : blockIdx.x] = scale.value;
  }
  store_transposed(shared, first_line, first_column, p);
}

Target target_of(const TensorView& bytes, const TensorView& scales) {
  if (!bytes.defined()) return {};
  return {bytes.as<uint8_t>(), bytes.stride(0), scales.as<float>()};
}

void check_target(const Checker& at, const TensorView& bytes, const char* name, const TensorView& scales,
                  const char* scales_name, int64_t lines, int64_t k, int64_t block) {
  if (bytes.defined() != scales.defined()) {
    at.fail_at(scales_name, std::string("are wanted with ") + name + ", and only with them");
  }
  const int64_t whole = blocks_of(k, 16) * 16;
  check_bytes(at, bytes, name);
  at.shape(bytes, name, {lines, whole});
  at.contiguous(bytes, name);
  if (bytes.defined() && reinterpret_cast<uintptr_t>(bytes.data) % 16 != 0) {
    at.fail_at(name, "must begin at a multiple of 16 bytes");
  }
  at.dtype(scales, scales_name, {DType::f32});
  block == 0 ? at.shape(scales, scales_name, {1, 1})
             : at.shape(scales, scales_name, {blocks_of(k, kScaleDepth), blocks_of(lines, block)});
  at.contiguous(scales, scales_name);
}

}  // namespace

void validate(const Fp8Quantise& p) {
  const Checker at{"fp8_quantise"};
  at.defined(p.x, "x");
  at.dtype(p.x, "x", kFloatTypes);
  if (p.x.ndim != 2) at.fail_at("x", "must be (lines, k), got " + p.x.shape());
  at.unit_last_stride(p.x, "x");
  if (p.format != "e4m3" && p.format != "e5m2") {
    at.fail_at("format", "is '" + p.format + "'; allowed: 'e4m3', 'e5m2'");
  }
  if (p.block != 0 && p.block != 1 && p.block != 128) {
    at.fail_at("block", "is " + std::to_string(p.block) + "; allowed: 0, 1, 128");
  }
  const int64_t lines = p.x.size(0), k = p.x.size(1);
  check_target(at, p.rows, "rows", p.row_scales, "row_scales", lines, k, p.block);
  check_target(at, p.columns, "columns", p.column_scales, "column_scales", k, lines, p.block);
  if (p.block == 0) at.defined(p.maxima, "maxima");
  at.dtype(p.maxima, "maxima", {DType::f32});
  at.contiguous(p.maxima, "maxima");
  if (p.maxima.defined() && (p.maxima.ndim != 1 || p.maxima.size(0) < 1 || p.maxima.size(0) > kMostMaxima)) {
    at.fail_at("maxima", "must be (1 to 512,), got " + p.maxima.shape());
  }
}

void run(const Fp8Quantise& p, Stream stream) {
  const int columns = columns_of("fp8_quantise", p.x);
  const int64_t tiles = blocks_of(p.x.size(0), kTile) * blocks_of(columns, kTile);
  check(p.x.size(0) <= INT32_MAX - kTile && tiles <= INT32_MAX,
        "fp8_quantise: x " + p.x.shape() + " has more lines or tiles than are supported on CUDA");
  check_is_hopper("fp8_quantise");
  if (p.x.numel() == 0) return;
  const Whole whole{static_cast<int>(p.x.size(0)),
                    columns,
                    static_cast<int>(p.block),
                    p.maxima.as<float>(),
                    p.maxima.defined() ? static_cast<int>(p.maxima.size(0)) : 0,
                    target_of(p.rows, p.row_scales),
                    target_of(p.columns, p.column_scales)};
  visit_float(p.x.dtype, [&]<class T>(T) {
    const auto x = rows_of<const T>(p.x);
    if (p.block == 0) {
      launch({"fp8_maxima", dim3(static_cast<unsigned>(whole.parts)), dim3(kThreads), cuda_stream(stream), p.x},
             fp8_maxima<T>, x, p.x.size(0), columns, p.maxima.as<float>());
    }
    launch({"fp8_quantise", dim3(static_cast<unsigned>(tiles)), dim3(kThreads), cuda_stream(stream), p.x},
           p.format == "e4m3" ? fp8_quantise<T, E4m3> : fp8_quantise<T, E5m2>, x, whole);
  });
}

}  // namespace llmengine::cuda
