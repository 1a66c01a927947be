// The products of attention, on float micro-kernels (cpu/tile_gemm.h) or on those of pairs of bf16 (cpu/pair_tile.h). A
// tile of scores lies transposed, (keys, rows), and with it each is of two operands that are packed once for many
// tiles:
//
//                              left                     right                    result
//   scores                     key or value             query^T or grad^T        tile (keys, rows), floats
//   add_to_keys                tile                     query or grad            (keys, columns) +=
//   add_to_rows, in floats     tile^T, as it lies       value or key             (rows, columns) = beta ... +
//   add_to_rows, in pairs      value^T or key^T         tile                     (columns, rows) = beta ... +
//
// The last differs since pairs lie along the sum, of left operands side by side: weights become the right operand, a
// single permutation away from the tile, and the sums lie transposed until they are stored. Weights are rounded to bf16
// as they are paired; scores, statistics and sums are floats.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/pair_tile.h"

namespace llmengine::cpu::LLMENGINE_ISA {

inline Span panel_of(int64_t v, int64_t panel_vectors, int64_t vectors) {
  return {v, std::min(v + panel_vectors, vectors)};
}

// T: of the tensors. Operands stay where they lie, if the micro-kernel may read them there: of a left one it reads
// whole stripes of rows, of a right one whole vectors. `to`: room to pack them, of so many floats.
template <class T>
struct FloatProducts {
  struct Session {};
  struct Left {
    const float* data;
    int64_t stride;
  };
  struct Right {  // in panels that the first-level cache holds while all stripes of the left operand meet them
    const float* data;
    int64_t stride, panel_stride;
  };
  using Summands = Right;
  static constexpr int64_t kStripe = kTileRows, kPairs = 0;
  static constexpr int64_t kRightPanel = kTileVectors * kLanes;

  static int64_t left_floats(int64_t columns) { return kKeys * padded(columns); }
  static int64_t right_floats(int64_t columns) { return kRows * round_up(columns, kRightPanel); }
  static int64_t summand_floats(int64_t columns) { return kKeys * round_up(columns, kRightPanel); }
  static int64_t transposed_floats(int64_t columns) { return kRows * columns; }

  static Left left(const Rows<const T>& x, int64_t first, int64_t count, float* to) {
    if constexpr (std::is_same_v<T, float>) {
      if (count % kTileRows == 0) return {x.row(first), x.stride};
    }
    pack_rows(x.row(first), x.stride, count, x.columns, to, padded(x.columns));
    return {to, padded(x.columns)};
  }
  static Right right(const Rows<const T>& x, int64_t first, int64_t count, float* to) {
    if constexpr (std::is_same_v<T, float>) {
      const bool packed = x.columns <= kRightPanel && x.columns % kLanes == 0 && x.stride == x.columns;
      if (packed) return {x.row(first), x.stride, 0};
    }
    for (int64_t c = 0; c < x.columns; c += kRightPanel) {
      const int64_t columns = std::min(kRightPanel, x.columns - c);
      pack_rows(x.row(first) + c, x.stride, count, columns, to + c * count, padded(columns), kRightPanel);
    }
    return {to, kRightPanel, kRightPanel * count};
  }
  static Summands summands(const Rows<const T>& x, int64_t first, int64_t count, float* to) {
    return right(x, first, count, to);
  }
  static void transpose_rows(const Rows<const T>& x, int64_t count, float* to) {
    pack_transposed(x.data, x.stride, count, x.columns, to);
  }

  static void scores(const TilePlace& at, const Left& keys, int64_t depth, float scale, const float* transposed,
                     float* tile) {
    for (int64_t v = 0; v < at.vectors(); v += kPanelVectors) {
      for_stripes(at.keys, kStripe, [&](int64_t c, int count) {
        const Span vectors = common(at.vectors_of(c), {v, v + kPanelVectors});
        multiply_stripe<Lies::along, Into::times>(kPanelVectors, count, vectors, depth, keys.data + c * keys.stride,
                                                  keys.stride, transposed, kPanel, depth * kPanel, tile + c * kRows,
                                                  kRows, &scale);
      });
    }
  }

  static void add_to_keys(const TilePlace& at, float* tile, const Right& rows, int64_t columns, float* to, bf16*) {
    const int64_t width = padded(columns), vectors = width / kLanes;
    for (int64_t v = 0; v < vectors; v += kTileVectors) {
      for_stripes(at.keys, kStripe, [&](int64_t c, int count) {
        const Span made = at.vectors_of(c);
        const int64_t r = made.begin * kLanes, depth = std::min(at.rows, made.end * kLanes) - r;
        multiply_stripe<Lies::along, Into::add>(kTileVectors, count, panel_of(v, kTileVectors, vectors), depth,
                                                tile + c * kRows + r, kRows, rows.data + r * rows.stride, rows.stride,
                                                rows.panel_stride, to + c * width, width);
      });
    }
  }

  // beta: a factor for each row; null: 1
  static void add_to_rows(const TilePlace& at, float* tile, const Summands& keys, int64_t columns, const float* beta,
                          float* sums, bf16*) {
    const int64_t width = padded(columns), vectors = width / kLanes;
    const auto add = [&]<Into into>(int64_t v, int64_t r, int count) {
      const Span seen = at.keys_seen(r, count);
      multiply_stripe<Lies::across, into>(kTileVectors, count, panel_of(v, kTileVectors, vectors), seen.count(),
                                          tile + seen.begin * kRows + r, kRows, keys.data + seen.begin * keys.stride,
                                          keys.stride, keys.panel_stride, sums + r * width, width, beta + r);
    };
    for (int64_t v = 0; v < vectors; v += kTileVectors) {
      for_stripes(at.rows, kTileRows, [&](int64_t r, int count) {
        if (beta) {
          add.template operator()<Into::scaled>(v, r, count);
        } else {
          add.template operator()<Into::add>(v, r, count);
        }
      });
    }
  }

  static void write_rows(const float* sums, int64_t count, const float* factors, const Rows<T>& to) {
    for (int64_t r = 0; r < count; ++r) {
      const float* line = sums + r * padded(to.columns);
      for_lanes(to.columns, [&](int64_t c, auto n) { store_n(to.row(r) + c, load(line + c) * factors[r], n); });
    }
  }

  // sums[r] = the product of row r of x and of row r of an operand that lies transposed, added in the order in which
  // `scores` does. `memory`: transposed_floats.
  static void row_products(const Rows<const T>& x, int64_t rows, const float* transposed, float* memory, float* sums) {
    transpose_rows(x, rows, memory);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t panel = r / kPanel * kPanel * x.columns + r % kPanel;
      F total = {};
      for (int64_t run = 0; run < x.columns; run += kRun) {
        F sum = {};
        for (int64_t c = run; c < std::min(run + kRun, x.columns); ++c) {
          sum += load(memory + panel + c * kPanel) * load(transposed + panel + c * kPanel);
        }
        total += sum;
      }
      store(sums + r, total);
    }
  }
};

struct PairProducts {
  using T = bf16;
  using Session = PairSession;
  struct Left {
    const bf16* data;
    int64_t stride;
  };
  struct Right {
    const bf16* data;
    int64_t panel_stride;
  };
  using Summands = Left;
  static constexpr int64_t kStripe = kStripeRows;
  static_assert(kRows == kKeys && kRows % kPairPanel % kLanes == 0 && kRows % (2 * kLanes) == 0);
  // bf16 that a tile takes, as a left operand or as a right one
  static constexpr int64_t kPairs = count_of(kRows, kPairPanel) * pair_panel_size(kKeys);

  static int64_t left_floats(int64_t columns) { return kKeys * pair_depth(columns) / 2; }
  static int64_t right_floats(int64_t columns) { return count_of(columns, kPairPanel) * pair_panel_size(kRows) / 2; }
  static int64_t summand_floats(int64_t columns) { return round_up(columns, kStripe) * kKeys / 2; }
  static int64_t transposed_floats(int64_t columns) {
    return count_of(kRows, kPairPanel) * pair_panel_size(columns) / 2;
  }

  static bf16* halves_of(float* to) { return reinterpret_cast<bf16*>(to); }
  static const bf16* halves_of(const float* from) { return reinterpret_cast<const bf16*>(from); }

  static Left left(const Rows<const T>& x, int64_t first, int64_t count, float* to) {
    if (count % kStripe == 0 && x.columns % kPairDepth == 0) return {x.row(first), x.stride};
    const int64_t stride = pair_depth(x.columns);
    for (int64_t r = 0; r < count; ++r) pack_line(x.row(first + r), x.columns, halves_of(to) + r * stride);
    return {halves_of(to), stride};
  }
  static Right right(const Rows<const T>& x, int64_t first, int64_t count, float* to) {
    pack_pairs(x.row(first), x.stride, count, x.columns, halves_of(to));
    return {halves_of(to), pair_panel_size(count)};
  }
  static Summands summands(const Rows<const T>& x, int64_t first, int64_t count, float* to) {
    pack_lines_transposed(x.row(first), x.stride, x.columns, count, halves_of(to), kKeys);
    return {halves_of(to), kKeys};
  }
  static void transpose_rows(const Rows<const T>& x, int64_t count, float* to) {
    pack_pairs_transposed(x.data, x.stride, count, x.columns, halves_of(to));
  }

  static void scores(const TilePlace& at, const Left& keys, int64_t depth, float scale, const float* transposed,
                     float* tile) {
    const bf16* panel = halves_of(transposed);
    for (int64_t v = 0; v < at.vectors(); v += kPairVectors, panel += pair_panel_size(depth)) {
      for_stripes(at.keys, kStripe, [&](int64_t c, int count) {
        const Span vectors = common(at.vectors_of(c), panel_of(v, kPairVectors, at.vectors()));
        if (vectors.count() <= 0) return;
        multiply_stripe<Into::times>(static_cast<int>(vectors.count()), count, pair_depth(depth),
                                     keys.data + c * keys.stride, keys.stride, panel + 2 * (vectors.begin - v) * kLanes,
                                     tile + c * kRows + vectors.begin * kLanes, kRows, &scale);
      });
    }
  }

  static void add_to_keys(const TilePlace& at, float* tile, const Right& rows, int64_t columns, float* to,
                          bf16* weights) {
    clear_unmade(at, tile);
    for (int64_t c = 0; c < at.keys; ++c) pack_line(tile + c * kRows, at.rows, weights + c * kRows);
    const int64_t width = padded(columns), vectors = width / kLanes;
    const bf16* panel = rows.data;
    for (int64_t v = 0; v < vectors; v += kPairVectors, panel += rows.panel_stride) {
      for_stripes(at.keys, kStripe, [&](int64_t c, int count) {
        const Span made = at.vectors_of(c), columns = panel_of(v, kPairVectors, vectors);
        const int64_t r = made.begin * kLanes / kPairDepth * kPairDepth;
        const int64_t depth = pair_depth(std::min(at.rows, made.end * kLanes) - r);
        if (depth <= 0) return;
        add_stripe(static_cast<int>(columns.count()), count, depth, weights + c * kRows + r, panel + r * kPairPanel,
                   to + c * width + v * kLanes, width);
      });
    }
  }

  static void add_to_rows(const TilePlace& at, float* tile, const Summands& keys, int64_t columns, const float* beta,
                          float* sums, bf16* weights) {
    clear_unmade(at, tile);
    pack_pairs(tile, kRows, at.keys, padded(at.rows), weights);
    if (beta) rescale(at.vectors(), columns, beta, sums);
    const bf16* panel = weights;
    for (int64_t v = 0; v < at.vectors(); v += kPairVectors, panel += pair_panel_size(at.keys)) {
      const Span vectors = panel_of(v, kPairVectors, at.vectors());
      Span made = at.keys_of(vectors.begin);
      for (int64_t i = vectors.begin + 1; i < vectors.end; ++i) made = around(made, at.keys_of(i));
      const int64_t k = made.begin / kPairDepth * kPairDepth, depth = pair_depth(made.end - k);
      if (depth <= 0) continue;
      for_stripes(columns, kStripe, [&](int64_t c, int count) {
        multiply_stripe<Into::add>(static_cast<int>(vectors.count()), count, depth, keys.data + c * keys.stride + k,
                                   keys.stride, panel + k * kPairPanel, sums + c * kRows + v * kLanes, kRows, nullptr);
      });
    }
  }

  static void write_rows(const float* sums, int64_t count, const float* factors, const Rows<T>& to) {
    for (int64_t r = 0; r < count; r += kLanes) {
      const F factor = load(factors + r);
      for_lanes(to.columns, [&](int64_t c, auto n) {
        F block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = i < n ? load(sums + (c + i) * kRows + r) * factor : F{};
        transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - r); ++i) store_n(to.row(r + i) + c, block[i], n);
      });
    }
  }

#if defined(LLMENGINE_AMX)
  // Tiles add the even and the odd k apart, which no other instruction does: the products are the diagonals of tiles.
  static void row_products(const Rows<const T>& x, int64_t rows, const float* transposed, float* memory, float* sums) {
    const Left lines = left(x, 0, rows, memory);
    for (int64_t r = 0; r < rows; r += kAmxRows) {
      alignas(64) float products[kAmxRows][kLanes];
      const bf16* panel = halves_of(transposed) + r / kPairPanel * pair_panel_size(x.columns) + 2 * (r % kPairPanel);
      multiply_amx<1, 1, false>(pair_depth(x.columns), lines.data + r * lines.stride, lines.stride, panel, products[0],
                                kLanes);
      for (int i = 0; i < kAmxRows; ++i) sums[r + i] = r + i < rows ? products[i][i] : 0.0f;
    }
  }
#else
  static void row_products(const Rows<const T>& x, int64_t rows, const float* transposed, float* memory, float* sums) {
    transpose_rows(x, rows, memory);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t panel = r / kPairPanel * pair_panel_size(x.columns) + 2 * (r % kPairPanel);
      F sum = {};
      for (int64_t k = 0; k < pair_depth(x.columns); k += 2) {
        const int64_t pairs = panel + k * kPairPanel;
        sum = add_products(sum, load_pairs(halves_of(memory) + pairs), load_pairs(halves_of(transposed) + pairs));
      }
      store(sums + r, sum);
    }
  }
#endif

 private:
  // What a tile of rows gives to its keys is summed from zero on, and added as a whole: which tiles go into which
  // accumulator (kernels/attention_backward.cpp) then changes no bit.
  static void add_stripe(int vectors, int count, int64_t depth, const bf16* weights, const bf16* panel, float* to,
                         int64_t width) {
#if defined(LLMENGINE_AMX)
    alignas(64) float products[kStripe * kPairPanel];
    multiply_stripe<Into::place>(vectors, kStripe, depth, weights, kRows, panel, products, kPairPanel, nullptr);
    for (int r = 0; r < count; ++r) {
      for (int v = 0; v < vectors; ++v) {
        float* x = to + r * width + v * kLanes;
        store(x, load(x) + load(products + r * kPairPanel + v * kLanes));
      }
    }
#else
    multiply_stripe<Into::add>(vectors, count, depth, weights, kRows, panel, to, width, nullptr);
#endif
  }

  static Span around(Span a, Span b) {
    if (a.count() <= 0) return b;
    return b.count() <= 0 ? a : Span{std::min(a.begin, b.begin), std::max(a.end, b.end)};
  }

  // Weights are paired and multiplied beyond what is made of a tile.
  static void clear_unmade(const TilePlace& at, float* tile) {
    for (int64_t v = 0; at.band && v < at.vectors(); ++v) {
      const auto clear = [&](Span keys) {
        for (int64_t c = keys.begin; c < keys.end; ++c) store(tile + c * kRows + v * kLanes, F{});
      };
      clear({0, at.keys_of(v).begin});
      clear({at.keys_of(v).end, at.keys});
    }
  }

  // Vectors of rows whose maximum a tile left as it was keep their sums.
  static void rescale(int64_t vectors, int64_t columns, const float* beta, float* sums) {
    for (int64_t v = 0; v < vectors; ++v) {
      const F factor = load(beta + v * kLanes);
      if (reduce_max(select(factor != 1.0f, broadcast(1.0f), F{})) == 0.0f) continue;
      for (int64_t c = 0; c < columns; ++c) {
        float* x = sums + c * kRows + v * kLanes;
        store(x, load(x) * factor);
      }
    }
  }
};

template <class T>
using Products = std::conditional_t<kPairsPay && std::is_same_v<T, bf16>, PairProducts, FloatProducts<T>>;

}  // namespace llmengine::cpu::LLMENGINE_ISA
