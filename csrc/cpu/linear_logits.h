// What linear cross-entropy's kernels share: the labelled tokens' logits as tiles of a product, and where gradients go.
#pragma once

#include <vector>

#include "cpu/gemm.h"
#include "cpu/lines.h"
#include "cpu/token_loss.h"
#include "ops/linear_cross_entropy.h"

namespace llmengine::cpu::LLMENGINE_ISA {

constexpr int64_t kClasses = ops::kClassBlock;  // of a block of gradients, whose rows lie so far apart
static_assert(kClasses % kTileColumns == 0);

// Rows [first, first + count) of a matrix.
inline TensorView rows_of(const TensorView& t, int64_t first, int64_t count) {
  TensorView part = t;
  part.data = static_cast<char*>(t.data) + first * t.stride(0) * size_of(t.dtype);
  part.sizes[0] = count;
  return part;
}

// What both directions know of a call: the tokens that have labels, and the product that gives their logits.
template <class Params>
struct Logits {
  const Params& p;
  const ops::TokenLoss token{p.weight, p.linear_weight.size(0), p.label_smoothing, p.z_loss};
  const Cap cap{p.softcap};
  const int64_t d = p.input.size(1), classes = p.linear_weight.size(0);
  const std::vector<float> bias = as_floats(p.linear_bias, p.linear_bias.defined() ? classes : 0, 0.0f);
  std::vector<int64_t> labelled;

  // shard: any target is a class, if only another shard's
  Logits(const Params& params, const char* op, bool shard = false) : p(params) {
    for (int64_t row = 0; row < p.input.size(0); ++row) {
      const bool any = shard ? target(row) != p.ignore_index : token.labelled(op, target(row), row, p.ignore_index);
      if (any) labelled.push_back(row);
    }
  }

  int64_t target(int64_t row) const { return p.target.template as<int64_t>()[row]; }

  // Calls epilogue(tile) on the logits, bias included, of labelled tokens [row, row + rows) and classes [first, first +
  // n); the tile counts from there. Logits have the same bits whichever part they are formed in: the backward must find
  // those of which the forward made lse, or the gradient of a target that is nearly certain would be their difference.
  template <class Body>
  void tiles(int64_t row, int64_t rows, int64_t first, int64_t n, const Body& epilogue, Destination to = {}) const {
    gemm(rows, n,
         {{Matrix(p.input).gathered(labelled.data() + row), Matrix(rows_of(p.linear_weight, first, n)).t(), d}},
         [&](const Tile& tile) {
           if (!bias.empty()) add_bias(tile, bias.data() + first + tile.column);
           epilogue(tile);
         },
         to, {}, {static_cast<int64_t>(labelled.size()), classes});
  }

  static void add_bias(const Tile& tile, const float* line) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* z = tile.c[0] + r * tile.stride;
      for_lanes(tile.columns, [&](int64_t i, auto n) { store_n(z + i, load_n(z + i, n) + load_n(line + i, n), n); });
    }
  }
};

// `to` = or += a tile whose row r lies at to + index(r) stride
template <class Index>
void gather_tile(const Tile& tile, bool add, float* to, int64_t stride, const Index& index) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* c = tile.c[0] + r * tile.stride;
    float* out = to + index(tile.row + r) * stride + tile.column;
    for_lanes(tile.columns, [&](int64_t i, auto n) {
      const F value = load_n(c + i, n);
      store_n(out + i, add ? load_n(out + i, n) + value : value, n);
    });
  }
}

// A row of float sums, or of zeros, rounded to its tensor.
inline void round_row(const float* sums, const TensorView& out, int64_t row) {
  visit_float(out.dtype, [&]<class T>(T) {
    T* to = out.as<T>() + row * out.stride(0);
    for_lanes(out.size(1), [&](int64_t i, auto n) { store_n(to + i, sums ? load_n(sums + i, n) : F{}, n); });
  });
}

// grad_input of a call from p.sums: zeros where there is no label; the others are rounded where it is not the sums
// themselves.
template <class Params>
void finish_grad_input(const Logits<Params>& of) {
  const Params& p = of.p;
  if (!p.grad_input.defined()) return;
  const float* sums = p.sums.template as<float>();
  parallel_each(p.input.size(0), [&](int64_t row) {
    const bool any = of.target(row) != p.ignore_index && of.classes > 0;
    if (!any || sums != p.grad_input.data) round_row(any ? sums + row * of.d : nullptr, p.grad_input, row);
  });
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
