// Matrix products in tiles of C (contract: cpu/gemm.h), blocked as by Goto & van de Geijn ("Anatomy of high-performance
// matrix multiplication", 2008).
//
//           <- strip: packed B of all depth, at most kStripBytes or one tile wide ->
//           +--- tile ---+--- tile ---+            B: blocks of kBlockDepth rows, each in panels of kPanel columns
//     tile  | C, float,  |            |            A: one tile's rows and kBlockDepth columns at a time
//     rows  | own scratch|            |            C: kTileRows x kPanel in registers for a block of depth, then added
//           +------------+------------+               to the tile in scratch
//
//   All threads pack a strip, then take tiles of it as they come free. A panel of B (16 KiB) stays in the first-level
//   cache while A's block (96 KiB) and C's tile (144 KiB) go by from the second; tiles of one column follow each other,
//   so that their B (depth x kTileColumns) comes from the third. Packing costs one pass over B in all and one over A
//   for each column of tiles, 1/384 of the multiply-adds. Limit: the multiply-add units.
//
//   A processor with matrix instructions wants other panels (pairs of bf16) and another inner product: that is Packing
//   and multiply_panels() below; strips, tiles and epilogues stay.
#include "cpu/gemm.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kBlockDepth = 256;
constexpr int64_t kRowOfA = kBlockDepth + 8;  // not a power of two: rows of a block must not share one cache set
constexpr int64_t kMostTileRows = 4 * kRowBlock;
constexpr int64_t kStripBytes = 8 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
const T* line(const Matrix& m, int64_t row) {
  return static_cast<const T*>(m.data) + (m.index ? m.index[row] : row) * m.stride;
}

// A(row .. row + rows, k .. k + depth), with zero rows up to a multiple of kTileRows; rows lie kRowOfA apart.
template <class T>
void pack_a_along(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t depth, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = line<T>(a, row + r) + k;
    for_lanes(depth, [&](int64_t i, auto n) { store_n(to + r * kRowOfA + i, load_n(x + i, n), n); });
  }
  for (int64_t r = rows; r < round_up(rows, kTileRows); ++r) std::fill_n(to + r * kRowOfA, depth, 0.0f);
}

// The same of a transposed A, in groups of kTileRows rows: element (r, k) of the group at row g at [g kRowOfA + k
// kTileRows + r].
template <class T>
void pack_a_across(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t depth, float* to) {
  const int64_t whole = rows / kTileRows * kTileRows;
  for (int64_t i = 0; i < depth; ++i) {
    const T* x = line<T>(a, k + i) + row;
    float* out = to + i * kTileRows;
    for (int64_t r = 0; r < whole; r += kTileRows) {
      for (int j = 0; j < kTileRows; ++j) out[r * kRowOfA + j] = widen(x[r + j]);
    }
    if (whole == rows) continue;
    for (int j = 0; j < kTileRows; ++j) out[whole * kRowOfA + j] = whole + j < rows ? widen(x[whole + j]) : 0.0f;
  }
}

// B(k .. k + depth, column .. column + columns) in panels: element (i, c) of the panel at column p at
// [p depth + i kPanel + c].
template <class T>
void pack_b(const Matrix& b, int64_t k, int64_t depth, int64_t column, int64_t columns, float* to) {
  if (b.transposed) return pack_transposed(line<T>(b, column) + k, b.stride, columns, depth, to);
  constexpr int64_t kRun = 16;  // rows at a time: as many pages as the first address cache holds with ease
  for (int64_t first = 0; first < depth; first += kRun) {
    const int64_t end = std::min(depth, first + kRun);
    for (int64_t p = 0; p < columns; p += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, columns - p);
      for (int64_t i = first; i < end; ++i) {
        const T* x = line<T>(b, k + i) + column + p;
        float* out = to + p * depth + i * kPanel;
        for_lanes(width, [&](int64_t c, auto n) { store(out + c, load_n(x + c, n)); });
      }
    }
  }
}

// C = or += A B, for one packed block of A and the panels of B beside it.
template <Lies lies, Into into>
void multiply_panels(int64_t rows, int64_t columns, int64_t depth, const float* a, const float* b, float* c,
                     int64_t c_stride) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int vectors = static_cast<int>(ceil_div(std::min<int64_t>(kPanel, columns - column), kLanes));
    for (int64_t row = 0; row < rows; row += kTileRows) {
      multiply_tile<lies, into>(vectors, kTileRows, depth, a + row * kRowOfA, lies == Lies::along ? kRowOfA : kTileRows,
                                b + column * depth, kPanel, c + row * c_stride + column, c_stride);
    }
  }
}

void multiply_panels(Lies lies, Into into, int64_t rows, int64_t columns, int64_t depth, const float* a, const float* b,
                     float* c, int64_t c_stride) {
  const auto multiply =
      lies == Lies::along
          ? (into == Into::place ? multiply_panels<Lies::along, Into::place> : multiply_panels<Lies::along, Into::add>)
          : (into == Into::place ? multiply_panels<Lies::across, Into::place>
                                 : multiply_panels<Lies::across, Into::add>);
  multiply(rows, columns, depth, a, b, c, c_stride);
}

// A run of at most kBlockDepth columns of a term's A and rows of its B.
struct Block {
  const Term* term;
  int64_t k, depth;
  int64_t before;  // depth of the blocks in front: says where in the strip its B is packed
  Into into;

  void pack_a(int64_t row, int64_t rows, float* to) const {
    visit_float(term->a.dtype, [&]<class T>(T) {
      const auto pack = term->a.transposed ? pack_a_across<T> : pack_a_along<T>;
      pack(term->a, row, rows, k, depth, to);
    });
  }
  void pack_b(int64_t column, int64_t columns, float* to) const {
    visit_float(term->b.dtype, [&]<class T>(T) { LLMENGINE_ISA::pack_b<T>(term->b, k, depth, column, columns, to); });
  }
};

class Gemm {
 public:
  Gemm(int64_t rows, int64_t columns, std::initializer_list<Term> terms, const Epilogue& epilogue)
      : rows_(rows), columns_(columns), epilogue_(epilogue) {
    for (const Term& term : terms) add(term);
    const int64_t tiles = ceil_div(columns, kTileColumns);
    const int64_t affordable = kStripBytes / 4 / std::max<int64_t>(depth_, 1) / kTileColumns;
    const int64_t strips = ceil_div(tiles, std::max<int64_t>(affordable, 1));
    strip_ = ceil_div(tiles, strips) * kTileColumns;
    // Too few tiles for the threads: lower ones. Their height changes no sum.
    while (tile_rows_ > kRowBlock && ceil_div(rows, tile_rows_) * tiles < 4 * num_threads()) tile_rows_ /= 2;
    tile_rows_ = std::min(tile_rows_, round_up(rows, kTileRows));
  }

  void run() const {
    static thread_local Scratch scratch;
    float* packed = scratch.take(depth_ * std::min(strip_, round_up(columns_, kPanel)))[0];
    for (int64_t column = 0; column < columns_; column += strip_) {
      const int64_t end = std::min(columns_, column + strip_), tiles = ceil_div(end - column, kTileColumns);
      const auto columns_of = [&](int64_t tile) { return std::min(kTileColumns, end - column - tile * kTileColumns); };
      const auto place = [&](const Block& block, int64_t tile) {
        return packed + block.before * round_up(end - column, kPanel) + tile * kTileColumns * block.depth;
      };
      parallel_each(tiles * static_cast<int64_t>(blocks_.size()), [&](int64_t task) {
        const Block& block = blocks_[task / tiles];
        const int64_t tile = task % tiles;
        block.pack_b(column + tile * kTileColumns, columns_of(tile), place(block, tile));
      });
      const int64_t layers = ceil_div(rows_, tile_rows_);
      parallel_each(tiles * layers, [&](int64_t task) {
        const int64_t tile = task / layers, row = task % layers * tile_rows_;
        run_tile(row, std::min(tile_rows_, rows_ - row), column + tile * kTileColumns, columns_of(tile),
                 [&](const Block& block) { return place(block, tile); });
      });
    }
  }

 private:
  int64_t rows_, columns_, strip_ = 0, tile_rows_ = kMostTileRows, depth_ = 0;
  int accumulators_ = 1;
  Epilogue epilogue_;
  std::vector<Block> blocks_;
  bool begun_[kAccumulators] = {};

  void add(const Term& term) {
    for (int64_t k = 0; k < term.depth; k += kBlockDepth) {
      const int64_t depth = std::min(kBlockDepth, term.depth - k);
      blocks_.push_back({&term, k, depth, depth_, begun_[term.into] ? Into::add : Into::place});
      begun_[term.into] = true;
      accumulators_ = std::max(accumulators_, term.into + 1);
      depth_ += depth;
    }
  }

  template <class PackedB>
  void run_tile(int64_t row, int64_t rows, int64_t column, int64_t columns, const PackedB& packed_b) const {
    static thread_local Scratch scratch;
    const int64_t padded_rows = round_up(rows, kTileRows), stride = round_up(columns, kPanel);
    const auto [a, c] = scratch.take(padded_rows * kRowOfA, accumulators_ * padded_rows * stride);
    Tile tile{row, column, rows, columns, {}, stride};
    for (int i = 0; i < accumulators_; ++i) {
      tile.c[i] = c + i * padded_rows * stride;
      if (!begun_[i]) std::fill_n(tile.c[i], rows * stride, 0.0f);
    }
    for (const Block& block : blocks_) {
      block.pack_a(row, rows, a);
      multiply_panels(block.term->a.transposed ? Lies::across : Lies::along, block.into, padded_rows, columns,
                      block.depth, a, packed_b(block), tile.c[block.term->into], stride);
    }
    epilogue_.call(epilogue_.context, tile);
  }
};

}  // namespace

void gemm(int64_t rows, int64_t columns, std::initializer_list<Term> terms, Epilogue epilogue) {
  if (rows > 0 && columns > 0) Gemm(rows, columns, terms, epilogue).run();
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
