// Cross-entropy of a linear layer and its gradients at once (formulas: ops/linear_cross_entropy.h).
//
//   For as many labelled tokens as the block of memory holds, with all of their classes:
//
//              kClasses   kClasses   ...           1  logits, tile by tile, end in the block as exp(z - the largest of
//            +----------+----------+----+             the row in the tile), beside the tile's largest and sum
//     tokens | piece    | piece    |    |          2  a row's tiles give its lse; times exp(largest - lse) its
//            +----------+----------+----+             exponentials are probabilities, and in place their gradient dx
//                                                  3  piece by piece: grad_input = sum of dx weight,
//                                                     grad_linear_weight += dx^T input, grad_linear_bias += sums of dx
//
//   Beside forward and backward apart (linear_cross_entropy.cpp): three products instead of four and one exponential a
//   logit instead of two, for the block's memory (the caller's), and grad_linear_weight read and written once a block.
//   Limit: the multiply-add units.
#include "cpu/linear_logits.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

struct WithGradients : Logits<ops::LinearCrossEntropyWithGradients> {
  // of one row's logits in one tile
  struct Part {
    LogSumExp lse;
    double weighted = 0.0;
  };
  const int64_t block_tokens = p.block.size(0), parts_of_row = (classes + kTileColumns - 1) / kTileColumns;
  std::vector<Part> parts;       // (block_tokens, parts_of_row)
  std::vector<float> of_target;  // (block_tokens,): the target's logit
  double scale = 1.0;            // of each token's loss in the whole

  explicit WithGradients(const ops::LinearCrossEntropyWithGradients& params)
      : Logits(params, "linear_cross_entropy"),
        parts(std::min(block_tokens, count()) * parts_of_row),
        of_target(std::min(block_tokens, count())) {}

  void run() {
    begin();
    static thread_local Scratch scratch;
    float* sums = scratch.take(p.grad_input.defined() ? std::min(block_tokens, count()) * d : 0)[0];
    for (int64_t first = 0; first < count(); first += block_tokens) {
      const int64_t rows = std::min(block_tokens, count() - first);
      for (int64_t c = 0; c < classes; c += kClasses) {
        tiles(
            first, rows, c, std::min(kClasses, classes - c),
            [&](const Tile& tile) {
              for (int64_t r = 0; r < tile.rows; ++r) add(tile, r, first, c + tile.column);
            },
            piece(c));
      }
      parallel_each(rows, [&](int64_t row) { finish_row(row, labelled[first + row]); });
      for (int64_t c = 0; c < classes; c += kClasses) add_piece(first, rows, c, std::min(kClasses, classes - c), sums);
      if (p.grad_input.defined()) {
        parallel_each(rows, [&](int64_t row) { round_row(sums + row * d, p.grad_input, labelled[first + row]); });
      }
    }
    reduce_losses(p, token);
  }

 private:
  int64_t count() const { return static_cast<int64_t>(labelled.size()); }

  // What tokens without a label get, and what the sums begin with.
  void begin() {
    std::fill_n(p.losses.as<float>(), p.input.size(0), 0.0f);
    std::fill_n(p.lse.as<float>(), p.input.size(0), 0.0f);
    if (p.grad_input.defined()) {
      parallel_each(p.input.size(0), [&](int64_t row) {
        if (!count() || target(row) == p.ignore_index) round_row(nullptr, p.grad_input, row);
      });
    }
    if (!count()) {
      if (p.grad_linear_weight.defined()) {
        parallel_each(classes, [&](int64_t row) { round_row(nullptr, p.grad_linear_weight, row); });
      }
      if (p.grad_linear_bias.defined()) std::fill_n(p.grad_linear_bias.as<float>(), classes, 0.0f);
    }
    if (p.reduction != "mean") return;
    double weights = 0.0;
    for (int64_t row : labelled) weights += token.weight_of(target(row));
    const float normaliser = static_cast<float>(weights);
    scale = normaliser == 0.0f ? 0.0 : 1.0 / normaliser;
  }

  // Classes [c, c + kClasses) in the block.
  Destination piece(int64_t c) const {
    Destination to;
    visit_float(p.block.dtype, [&]<class T>(T) { to.data = static_cast<char*>(static_cast<void*>(place<T>(0, c))); });
    to.size = size_of(p.block.dtype), to.row_bytes = kClasses * to.size;
    return to;
  }

  template <class T>
  T* place(int64_t row, int64_t c) const {
    return p.block.as<T>() + c / kClasses * block_tokens * kClasses + row * kClasses + c % kClasses;
  }

  // Row r of a tile whose first column is class c.
  void add(const Tile& tile, int64_t r, int64_t first, int64_t c) {
    const float* z = tile.c[0] + r * tile.stride;
    const int64_t row = tile.row + r, y = target(labelled[first + row]) - c;
    if (y >= 0 && y < tile.columns) of_target[row] = z[y];
    Part part;
    part.lse.largest = largest_of(z, tile.columns);
    const float shift = shift_for(part.lse.largest);
    F sums[4] = {};
    visit_float(p.block.dtype, [&]<class T>(T) {
      T* to = place<T>(row, c);
      for_lanes_by_4(tile.columns, [&](int64_t i, auto n, auto k) {
        const F e = exp_of_nonpositive(load_n(z + i, n, -INFINITY) - shift);
        store_n(to + i, e, n);
        sums[k] = sums[k] + e;
      });
    });
    part.lse.total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (p.label_smoothing > 0) {
      part.weighted = weighted_sum(token.weight ? token.weight + c : nullptr, z, tile.columns);
    }
    parts[row * parts_of_row + c / kTileColumns] = part;
  }

  // The loss of a row of the block and, of its exponentials, their gradient. The target's is finished in float before
  // its one rounding, as in LogitsGradient (cpu/token_loss.h).
  void finish_row(int64_t row, int64_t number) const {
    LogSumExp whole;
    double weighted = 0.0;
    for (int64_t i = 0; i < parts_of_row; ++i) {
      whole.add(parts[row * parts_of_row + i].lse);
      weighted += parts[row * parts_of_row + i].weighted;
    }
    const double lse = whole.value();
    const int64_t y = target(number);
    p.lse.as<float>()[number] = static_cast<float>(lse);
    p.losses.as<float>()[number] = token.value(y, lse, of_target[row], weighted);
    const auto factors = token.gradient(y, lse, scale);
    visit_float(p.block.dtype, [&]<class T>(T) {
      for (int64_t i = 0; i < parts_of_row; ++i) {
        const double shift = shift_for(parts[row * parts_of_row + i].lse.largest);
        const int64_t c = i * kTileColumns;
        gradient(place<T>(row, c), static_cast<float>(std::exp(shift - lse) * factors.probability), factors.smoothing,
                 c, std::min(kTileColumns, classes - c));
      }
      const float weight = token.weight ? token.weight[y] : 1.0f;
      const double probability = std::exp(of_target[row] - lse) * factors.probability;
      narrow(static_cast<float>(probability - weight * factors.smoothing - factors.target), place<T>(row, y));
    });
  }

  // x = x factor - w smoothing, for classes [first, first + n)
  template <class T>
  void gradient(T* x, float factor, float smoothing, int64_t first, int64_t n) const {
    const float* weight = token.weight && smoothing != 0.0f ? token.weight + first : nullptr;
    for_lanes(n, [&](int64_t i, auto lanes) {
      const F taken = weight ? load_n(weight + i, lanes) * smoothing : broadcast(smoothing);
      store_n(x + i, load_n(x + i, lanes) * factor - taken, lanes);
    });
  }

  // What classes [c, c + n) give, of tokens [first, first + rows) whose dx is in the block.
  void add_piece(int64_t first, int64_t rows, int64_t c, int64_t n, float* sums) const {
    Matrix dx;
    dx.dtype = p.block.dtype;
    dx.stride = kClasses;
    visit_float(dx.dtype, [&]<class T>(T) { dx.data = place<T>(0, c); });
    if (p.grad_input.defined()) {
      gemm(rows, d, {{dx, Matrix(rows_of(p.linear_weight, c, n)), n}},
           [&](const Tile& tile) { gather_tile(tile, c > 0, sums, d, [](int64_t r) { return r; }); });
    }
    if (p.grad_linear_weight.defined()) {
      const TensorView out = rows_of(p.grad_linear_weight, c, n);
      const auto store = [&](const Tile& tile) {
        if (out.dtype != DType::f32) return store_tile(tile, out);  // there is one block: see validate()
        gather_tile(tile, first > 0, out.as<float>(), out.stride(0), [](int64_t r) { return r; });
      };
      gemm(n, d, {{dx.t(), Matrix(p.input).gathered(labelled.data() + first), rows}}, store, out);
    }
    if (p.grad_linear_bias.defined()) {
      visit_float(dx.dtype, [&]<class T>(T) {
        column_sums(place<T>(0, c), kClasses, rows, n, first > 0, p.grad_linear_bias.as<float>() + c);
      });
    }
  }
};

void linear_cross_entropy_with_gradients(const ops::LinearCrossEntropyWithGradients& p) { WithGradients(p).run(); }

const Registrar<ops::LinearCrossEntropyWithGradients> registrar{linear_cross_entropy_with_gradients};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
