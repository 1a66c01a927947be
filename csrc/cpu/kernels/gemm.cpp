// Matrix products in tiles of C (contract: cpu/gemm.h), blocked as by Goto & van de Geijn ("Anatomy of high-performance
// matrix multiplication", 2008).
//
//           <- strip: packed B of all depth, at most kStripBytes or one tile wide ->
//           +--- tile ---+--- tile ---+            B: blocks of depth, each in panels of columns
//     tile  | C, float,  |            |            A: one layer's rows, in the same blocks
//     rows  | own scratch|            |            C: a few rows and a panel in registers for a block of depth, then
//           +------------+------------+               added to the tile in scratch
//
//   All threads pack a strip, then take layers of rows as they come free: a layer's A is packed once and meets all
//   tiles of the strip (only those of a part of it where layers are few). A panel of B stays in the first-level cache,
//   or streams from the second, while a layer's A goes by; C's tile (192 KiB) and A's block (136 KiB) stay in the
//   second, B comes from the third. Packing costs one pass over B in all and one over A for each strip. Limit: the
//   multiply-add units.
//
//   A term of float operands is multiplied in float (cpu/tile_gemm.h); one of bf16, or of bf16 and float, in pairs
//   where the processor has such products (cpu/pair_tile.h). A block of depth has the same bytes either way,
//   but for AMX.
//
//   AMX multiplies so fast that the third-level cache is the limit: each of B's bytes must meet some 300 rows, and be
//   asked for before it is wanted. So layers are tall and tiles narrow (288 x 192: 216 KiB of C); a panel of B and 32
//   rows of A, 256 deep, fit the first-level cache (16 KiB each), and while a panel multiplies, the next one is fetched
//   to the second. An A too deep to be kept there is packed block by block for a slab of tiles that are summed side by
//   side. With operands in the second-level cache the tiles reach 1.8 Tflop/s a core (2.6 from the first; 3.6 without
//   loads).
#include "cpu/gemm.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kBlockFloats = 256;              // of a row in a block of depth
constexpr int64_t kBlockPairs = kAmx ? 128 : 256;  // the same in pairs of bf16
// Rows of a layer; tall: where AMX multiplies all terms.
constexpr int64_t kMostTileRows = 128 / kRowBlock * kRowBlock, kFewestTileRows = round_up(kMostTileRows / 2, kRowBlock);
constexpr int64_t kMostTallRows = 288, kFewestTallRows = 96;
constexpr int64_t kStripBytes = 8 << 20;
constexpr int64_t kLayerBytes = kAmx ? 600 << 10 : 2 << 20;  // a layer's A, if all of it is to be kept
constexpr int64_t kSlabBytes = 600 << 10;                    // of C, else, where AMX multiplies
constexpr int64_t kPanels = std::lcm(kPanel, kPairPanel);    // columns, rounded up for panels of either kind
static_assert(kMostTallRows % kRowBlock == 0 && kFewestTallRows % kRowBlock == 0);

// From row to row of a packed block of A: an odd number of lines, as rows must not share one cache set.
constexpr int64_t kRowOfA = kBlockFloats + 16, kRowOfPairs = 2 * (kBlockPairs + 16);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
const T* line(const Matrix& m, int64_t row) {
  return static_cast<const T*>(m.data) + (m.index ? m.index[row] : row) * m.stride;
}

// A(row .. row + rows, k .. k + depth), with zero rows up to a multiple of kTallRows; rows lie kRowOfA apart.
template <class T>
void pack_a_along(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t depth, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = line<T>(a, row + r) + k;
    for_lanes(depth, [&](int64_t i, auto n) { store_n(to + r * kRowOfA + i, load_n(x + i, n), n); });
  }
  for (int64_t r = rows; r < round_up(rows, kTallRows); ++r) std::fill_n(to + r * kRowOfA, depth, 0.0f);
}

// The same of a transposed A, in groups of kTallRows rows: element (r, k) of the group at row g at [g kRowOfA + k
// kTallRows + r].
template <class T>
void pack_a_across(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t depth, float* to) {
  // A group is written as vectors of 8, where it is narrower too wide: its next line overwrites what is too much.
  constexpr int64_t kWide = round_up(kTallRows, 8), kAhead = 8;
  const int64_t wide = std::max<int64_t>(0, rows - kWide + kTallRows) / kTallRows * kTallRows;
  for (int64_t i = 0; i < depth; ++i) {
    const T* x = line<T>(a, k + i) + row;
    const T* ahead = line<T>(a, k + std::min(i + kAhead, depth - 1)) + row;  // a page away: nobody else asks for it
    for (int64_t r = 0; r < rows; r += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(ahead + r);
    float* out = to + i * kTallRows;
    for (int64_t r = 0; r < wide; r += kTallRows) {
      for (int j = 0; j < kWide; ++j) out[r * kRowOfA + j] = widen(x[r + j]);
    }
    for (int64_t r = wide; r < round_up(rows, kTallRows); ++r) {
      out[r / kTallRows * kTallRows * kRowOfA + r % kTallRows] = r < rows ? widen(x[r]) : 0.0f;
    }
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

// Where a tile will be written, if this is the last that is added to it.
struct Coming {
  Destination places[2];
  int64_t row, rows, column, columns;

  // for a panel of the tile's rows [begin, end)
  void ask(int64_t begin, int64_t end, int64_t panel) const {
    const int64_t width = std::min<int64_t>(kPanel, columns - panel);
    for (const Destination& to : places) {
      if (!to.data) continue;
      for (int64_t r = begin; r < std::min(end, rows); ++r) {
        const char* line = to.data + (row + r) * to.row_bytes + (column + panel) * to.size;
        for (int64_t i = 0; i < width * to.size; i += 64) __builtin_prefetch(line + i, 1, 2);
      }
    }
  }
};

// The depth of a block goes in equal runs: the error of a sum grows with the number of additions in one chain.
// PyTorch's chains are as long as a block where both sides of C are long, and short where one is, or the depth: there,
// products are taken in vectors of sums. Runs of 64 cost 3 to 5 % of the time, which few rows spend on packing anyway.
constexpr int64_t longest_run(int64_t depth, bool large) { return depth <= 128 ? 16 : large ? kBlockFloats : 64; }
constexpr bool is_large(int64_t rows, int64_t columns) { return rows >= 64 && columns >= 64; }

// C = or += A B, for one packed block of A and the panels of B beside it, in runs of the depth.

template <Lies lies, Into into>
void multiply_panels(int64_t rows, int64_t columns, int64_t depth, const float* a, const float* b, float* c,
                     int64_t c_stride, int64_t runs, const Coming& coming) {
  constexpr int64_t a_stride = lies == Lies::along ? kRowOfA : kTallRows, a_step = lies == Lies::along ? 1 : kTallRows;
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int vectors = static_cast<int>(ceil_div(std::min<int64_t>(kPanel, columns - column), kLanes));
    for (int64_t run = 0; run < runs; ++run) {  // of the panel: all rows meet it in the first-level cache
      const int64_t k = depth * run / runs, end = depth * (run + 1) / runs;
      const auto multiply =
          run ? multiply_tile<lies, Into::add, kTallRows, true> : multiply_tile<lies, into, kTallRows, true>;
      const float* next = b + column * depth + end * kPanel;  // comes from the third-level cache, unless asked for
      for (int64_t row = 0; row < rows; row += kTallRows) {
        coming.ask(row + kTallRows * run / runs, row + kTallRows * (run + 1) / runs, column);
        multiply(vectors, kTallRows, end - k, a + row * kRowOfA + k * a_step, a_stride, b + column * depth + k * kPanel,
                 kPanel, c + row * c_stride + column, c_stride, nullptr, next);
        next += 4 * (end - k);
      }
    }
  }
}

void multiply_panels(Lies lies, Into into, int64_t rows, int64_t columns, int64_t depth, const float* a, const float* b,
                     float* c, int64_t c_stride, int64_t runs, const Coming& coming) {
  const auto multiply =
      lies == Lies::along
          ? (into == Into::place ? multiply_panels<Lies::along, Into::place> : multiply_panels<Lies::along, Into::add>)
          : (into == Into::place ? multiply_panels<Lies::across, Into::place>
                                 : multiply_panels<Lies::across, Into::add>);
  multiply(rows, columns, depth, a, b, c, c_stride, runs, coming);
}

bf16* as_pairs(float* p) { return static_cast<bf16*>(static_cast<void*>(p)); }
const bf16* as_pairs(const float* p) { return static_cast<const bf16*>(static_cast<const void*>(p)); }

// The counterparts in bf16, to which float operands are rounded; rows of A lie kRowOfPairs apart.
void pack_a_for_pairs(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t depth, bf16* to) {
  visit_float(a.dtype, [&]<class T>(T) {
    if (a.transposed) {
      return pack_lines_transposed(line<T>(a, k) + row, a.stride, rows, depth, to, kRowOfPairs);
    }
    for (int64_t r = 0; r < rows; ++r) pack_line(line<T>(a, row + r) + k, depth, to + r * kRowOfPairs);
  });
}

void pack_b_for_pairs(const Matrix& b, int64_t k, int64_t depth, int64_t column, int64_t columns, bf16* to) {
  visit_float(b.dtype, [&]<class T>(T) {
    if (b.transposed) return pack_pairs_transposed(line<T>(b, column) + k, b.stride, columns, depth, to);
    pack_pairs_by<T>([&](int64_t i) { return line<T>(b, k + i) + column; }, depth, columns, to);
  });
}

// next: where B's panel behind the last of these lies, if known.
template <Into into>
void multiply_pair_panels(int64_t rows, int64_t columns, int64_t depth, const bf16* a, const bf16* b, float* c,
                          int64_t c_stride, const bf16* next) {
  const int64_t size = pair_panel_size(depth), vectors = ceil_div(columns, kLanes);
#if defined(LLMENGINE_AMX)
  for (int64_t v = 0; v < vectors; v += kPairVectors, b += size) {
    const bool last = v + kPairVectors >= vectors;
    multiply_panel<into>(rows, static_cast<int>(last ? vectors - v : kPairVectors), pair_depth(depth), a, kRowOfPairs,
                         b, c + v * kLanes, c_stride, last ? next : b + size);
  }
#else
  static_cast<void>(next);
  multiply_pairs<into>(rows, vectors, pair_depth(depth), a, kRowOfPairs, b, size, c, c_stride);
#endif
}

// A run of a term's depth, at most kBlockFloats or kBlockPairs.
struct Block {
  const Term* term;
  bool pairs;
  int64_t k, depth, before;  // before: floats of the blocks in front, which say where in the strip its B is packed
  int64_t runs;              // that float products take the depth in
  Into into;

  int64_t floats() const { return pairs ? pair_depth(depth) / 2 : depth; }
  int64_t row_of_a() const { return pairs ? kRowOfPairs / 2 : kRowOfA; }  // in floats

  void pack_a(int64_t row, int64_t rows, float* to) const {
    if (pairs) return pack_a_for_pairs(term->a, row, rows, k, depth, as_pairs(to));
    visit_float(term->a.dtype, [&]<class T>(T) {
      const auto pack = term->a.transposed ? pack_a_across<T> : pack_a_along<T>;
      pack(term->a, row, rows, k, depth, to);
    });
  }
  void pack_b(int64_t column, int64_t columns, float* to) const {
    if (pairs) return pack_b_for_pairs(term->b, k, depth, column, columns, as_pairs(to));
    visit_float(term->b.dtype, [&]<class T>(T) { LLMENGINE_ISA::pack_b<T>(term->b, k, depth, column, columns, to); });
  }
  void multiply(const Tile& tile, const float* a, const float* b, const float* next, const Coming& coming) const {
    float* c = tile.c[term->into];
    if (pairs) {
      const auto run = into == Into::place ? multiply_pair_panels<Into::place> : multiply_pair_panels<Into::add>;
      return run(round_up(tile.rows, kPairRows), tile.columns, depth, as_pairs(a), as_pairs(b), c, tile.stride,
                 next ? as_pairs(next) : nullptr);
    }
    multiply_panels(term->a.transposed ? Lies::across : Lies::along, into, round_up(tile.rows, kTallRows), tile.columns,
                    depth, a, b, c, tile.stride, runs, coming);
  }
};

class Gemm {
 public:
  Gemm(int64_t rows, int64_t columns, std::initializer_list<Term> terms, const Epilogue& epilogue, Destination first,
       Destination second, Whole whole)
      : rows_(rows),
        columns_(columns),
        large_(is_large(std::max(rows, whole.rows), std::max(columns, whole.columns))),
        epilogue_(epilogue),
        destinations_{first, second} {
    for (const Term& term : terms) add(term);
    const int64_t tiles = ceil_div(columns, kTileColumns);
    const int64_t affordable = kStripBytes / 4 / std::max<int64_t>(floats_, 1) / kTileColumns;
    const int64_t strips = ceil_div(tiles, std::max<int64_t>(affordable, 1));
    strip_ = ceil_div(tiles, strips) * kTileColumns;
    choose_layers(tiles);
  }

  void run() const {
    static thread_local Scratch scratch;
    float* packed = scratch.take(floats_ * std::min(strip_, round_up(columns_, kPanels)))[0];
    for (int64_t column = 0; column < columns_; column += strip_) {
      const Strip strip{column, std::min(columns_, column + strip_), packed};
      parallel_each(strip.tiles() * blocks(), [&](int64_t task) {
        const Block& block = blocks_[task / strip.tiles()];
        const int64_t tile = task % strip.tiles();
        block.pack_b(strip.column(tile), strip.columns(tile), strip.place(block, tile));
      });
      const int64_t layers = ceil_div(rows_, tile_rows_);
      const int64_t wanted = num_threads() == 1 ? 1 : ceil_div(4 * num_threads(), layers);
      const int64_t parts = std::min(strip.tiles(), wanted);
      parallel_each(layers * parts, [&](int64_t task) {
        const int64_t row = task / parts * tile_rows_, part = task % parts;
        run_layer(row, std::min(tile_rows_, rows_ - row), strip, strip.tiles() * part / parts,
                  strip.tiles() * (part + 1) / parts);
      });
    }
    scratch.release_large();  // a tile's columns of a weight gradient's tokens
  }

 private:
  // Columns [begin, end) of C, and where B is packed for them.
  struct Strip {
    int64_t begin, end;
    float* packed;

    int64_t tiles() const { return ceil_div(end - begin, kTileColumns); }
    int64_t column(int64_t tile) const { return begin + tile * kTileColumns; }
    int64_t columns(int64_t tile) const { return std::min(kTileColumns, end - column(tile)); }
    float* place(const Block& block, int64_t tile) const {
      return packed + block.before * round_up(end - begin, kPanels) + tile * kTileColumns * block.floats();
    }
  };

  int64_t rows_, columns_;
  bool large_;
  int64_t strip_ = 0, tile_rows_ = 0, floats_ = 0;
  int accumulators_ = 1;
  bool tall_ = kAmx;
  bool keeps_a_ = false;    // a layer's A is packed whole, for all of its tiles
  int64_t slab_tiles_ = 1;  // that share a block of A, if it is not
  Epilogue epilogue_;
  Destination destinations_[2];
  std::vector<Block> blocks_;
  bool begun_[kAccumulators] = {};

  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }

  void add(const Term& term) {
    const bool pairs = kPairsPay && (term.a.dtype == DType::bf16 || term.b.dtype == DType::bf16);
    const int64_t step = pairs ? 2 * kBlockPairs : kBlockFloats;
    tall_ &= pairs || term.depth == 0;
    accumulators_ = std::max(accumulators_, term.into + 1);
    for (int64_t k = 0; k < term.depth; k += step) {
      const Into into = begun_[term.into] ? Into::add : Into::place;
      const int64_t depth = std::min(step, term.depth - k);
      blocks_.push_back({&term, pairs, k, depth, floats_, ceil_div(depth, longest_run(depth, large_)), into});
      floats_ += blocks_.back().floats();
      begun_[term.into] = true;
    }
  }

  // No choice changes a sum.
  void choose_layers(int64_t tiles) {
    const int64_t threads = num_threads();
    // as many layers for each thread
    const int64_t layers = round_up(ceil_div(rows_, tall_ ? kMostTallRows : kMostTileRows), threads);
    tile_rows_ = std::max(tall_ ? kFewestTallRows : kFewestTileRows, round_up(ceil_div(rows_, layers), kRowBlock));
    while (threads > 1 && tile_rows_ > kRowBlock && ceil_div(rows_, tile_rows_) * tiles < 4 * threads) {
      tile_rows_ = round_up(tile_rows_ / 2, kRowBlock);
    }
    tile_rows_ = std::min(tile_rows_, round_up(rows_, kRowStep));
    keeps_a_ = floats_ * tile_rows_ * 4 <= kLayerBytes;
    if (tall_ && !keeps_a_)
      slab_tiles_ = std::max<int64_t>(1, kSlabBytes / (accumulators_ * tile_rows_ * kTileColumns * 4));
  }

  // Tiles [first, last) of the strip, in rows [row, row + rows).
  void run_layer(int64_t row, int64_t rows, const Strip& strip, int64_t first, int64_t last) const {
    static thread_local Scratch scratch;
    const PairSession session;
    const int64_t padded_rows = round_up(rows, kRowStep), size = padded_rows * kTileColumns;
    const auto [a, c] =
        scratch.take((keeps_a_ ? blocks() : 1) * padded_rows * kRowOfA, slab_tiles_ * accumulators_ * size);
    const auto tile_at = [&, c = c](int64_t tile, int64_t begin) {
      const int64_t columns = strip.columns(tile);
      Tile out{row, strip.column(tile), rows, columns, {}, round_up(columns, kLanes)};
      for (int i = 0; i < accumulators_; ++i) out.c[i] = c + ((tile - begin) * accumulators_ + i) * size;
      return out;
    };
    for (int64_t begin = first; begin < last; begin += slab_tiles_) {
      const int64_t end = std::min(last, begin + slab_tiles_);
      for (int64_t i = 0; i < blocks(); ++i) {
        const Block& block = blocks_[i];
        float* packed_a = a + (keeps_a_ ? i * padded_rows * kRowOfA : 0);
        if (begin == first || !keeps_a_) block.pack_a(row, rows, packed_a);
        for (int64_t tile = begin; tile < end; ++tile) {
          const float* next = tile + 1 < end     ? strip.place(block, tile + 1)
                              : i + 1 < blocks() ? strip.place(blocks_[i + 1], begin)
                              : end < last       ? strip.place(blocks_[0], end)
                                                 : nullptr;
          const Tile out = tile_at(tile, begin);
          Coming coming{{}, row, rows, out.column, out.columns};
          if (i + 1 == blocks()) coming.places[0] = destinations_[0], coming.places[1] = destinations_[1];
          block.multiply(out, packed_a, strip.place(block, tile), next, coming);
        }
      }
      for (int64_t tile = begin; tile < end; ++tile) {
        const Tile out = tile_at(tile, begin);
        for (int i = 0; i < accumulators_; ++i) {
          if (!begun_[i]) std::fill_n(out.c[i], rows * out.stride, 0.0f);
        }
        epilogue_.call(epilogue_.context, out);
      }
    }
  }
};

}  // namespace

void gemm(int64_t rows, int64_t columns, std::initializer_list<Term> terms, Epilogue epilogue, Destination first,
          Destination second, Whole whole) {
  if (rows > 0 && columns > 0) Gemm(rows, columns, terms, epilogue, first, second, whole).run();
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
