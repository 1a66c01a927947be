// Matrix products whose result never has to lie in memory: it appears tile by tile, in a core's own cache, and goes
// from there through the caller's epilogue (bias, activation, dropout, loss, rounding).
//
//   C_into(rows, columns) = sum over terms of A(rows, depth) B(depth, columns)
//
//   Terms of one accumulator add up (the two halves of a gated layer's gradient); two accumulators share their tiles (a
//   gated layer's two projections). Operands are float32 or bfloat16, transposed or not. Where both operands of a term
//   are bfloat16 and the processor multiplies such (cpu/pair_tile.h) it does, with denormals for zero; otherwise they
//   are widened to float while packed. Sums are float. Each element is summed over depth in blocks of a fixed length,
//   in order, so that no number of threads changes a bit; but chains within a block are shorter where C has few rows or
//   columns, so that a row's bits may be others in a small product. csrc/cpu/kernels/gemm.cpp has the algorithm.
#pragma once

#include <initializer_list>
#include <numeric>
#include <type_traits>

#include "cpu/pair_tile.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// An operand where it lies: element (row, column) at data[row stride + column] or, transposed, data[column stride +
// row].
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
  bool transposed = false;
  const int64_t* index = nullptr;  // not transposed only: row r is that of number index[r]

  Matrix() = default;
  explicit Matrix(const TensorView& t) : data(t.data), dtype(t.dtype), stride(t.stride(0)) {}
  Matrix(const float* values, int64_t row_stride) : data(values), stride(row_stride) {}

  Matrix t() const {
    Matrix flipped = *this;
    flipped.transposed = !transposed;
    return flipped;
  }
  Matrix gathered(const int64_t* rows) const {
    Matrix some = *this;
    some.index = rows;
    return some;
  }
};

struct Term {
  Matrix a, b;
  int64_t depth = 0;
  int into = 0;  // accumulator 0 or 1
};

inline constexpr int kAccumulators = 2;
// Columns of a tile of C; tiles begin at their multiples. Divisible by every panel, and by 64.
inline constexpr int64_t kTileColumns = kAmx ? 192 : 384;
inline constexpr int64_t kRowStep = kPairsPay ? std::lcm(kTallRows, kPairRows) : kTallRows;  // that products come in
// Tiles begin at multiples of it, too.
inline constexpr int64_t kRowBlock = kAmx ? kStripeRows : round_up(4 * kTallRows, kRowStep);
static_assert(kTileColumns % kPanel == 0 && kTileColumns % kPairPanel == 0);

// A finished tile of C: element (row + r, column + c) of accumulator i at c[i][r stride + c]. The epilogue owns it: it
// may write there, up to `stride` floats a row.
struct Tile {
  int64_t row, column, rows, columns;
  float* c[kAccumulators];
  int64_t stride;
};

// The tile's first accumulator, plus a line of C's width and a matrix like `out` if given, rounded into its place
// there.
inline void store_tile(const Tile& tile, const TensorView& out, const float* bias = nullptr,
                       const TensorView& added = {}) {
  visit_float(out.dtype, [&]<class T>(T) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* to = out.as<T>() + (tile.row + r) * out.stride(0) + tile.column;
      const T* more = added.defined() ? added.as<T>() + (tile.row + r) * added.stride(0) + tile.column : nullptr;
      const float* c = tile.c[0] + r * tile.stride;
      for_lanes(tile.columns, [&](int64_t i, auto n) {
        F value = load_n(c + i, n);
        if (bias) value = value + load_n(bias + tile.column + i, n);
        if (more) value = value + load_n(more + i, n);
        store_n(to + i, value, n);
      });
    }
  });
}

// The tile's first accumulator, added to what `out`, float32, holds there.
inline void add_tile(const Tile& tile, const TensorView& out) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* to = out.as<float>() + (tile.row + r) * out.stride(0) + tile.column;
    const float* c = tile.c[0] + r * tile.stride;
    for_lanes(tile.columns, [&](int64_t i, auto n) { store_n(to + i, load_n(to + i, n) + load_n(c + i, n), n); });
  }
}

// Called once for every tile of C, from any thread, on no two tiles that overlap.
struct Epilogue {
  void (*call)(const void* context, const Tile&);
  const void* context;

  template <class Body>
    requires(!std::is_same_v<Body, Epilogue>)
  Epilogue(const Body& body)  // NOLINT: a lambda is an epilogue
      : call([](const void* b, const Tile& tile) { (*static_cast<const Body*>(b))(tile); }), context(&body) {}
};

// Where an epilogue will write: lines that are asked for while the last block of depth is multiplied, and so need not
// be waited for. A hint, at most two; element (row, column) is that of C.
struct Destination {
  char* data = nullptr;
  int64_t row_bytes = 0, size = 0;

  Destination() = default;
  Destination(const TensorView& t) {  // NOLINT: a tensor is a destination
    if (t.defined()) data = static_cast<char*>(t.data), size = size_of(t.dtype), row_bytes = t.stride(0) * size;
  }
};

// The size of a product of which another is a part, whose sums have the bits of the whole then.
struct Whole {
  int64_t rows = 0, columns = 0;
};

// Without terms (or with empty ones) C is zero, and the epilogue is called all the same.
void gemm(int64_t rows, int64_t columns, std::initializer_list<Term> terms, Epilogue epilogue, Destination first = {},
          Destination second = {}, Whole whole = {});

}  // namespace llmengine::cpu::LLMENGINE_ISA
