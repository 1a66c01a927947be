// Cross-entropy of a linear layer, forward and backward (formulas: ops/linear_cross_entropy.h).
//
//   Forward: the logits of the labelled tokens appear as tiles of a product (csrc/cpu/gemm.h) and end there:
//
//                     kStrip classes at a time ->
//              +--------+--------+--------+
//     labelled | tile: largest, sum exp,  |   a row's tiles are merged in order after each strip
//     tokens   | sum w z, z of the target |
//              +--------+--------+--------+
//
//   Backward, for kClasses classes and up to 2048 tokens at a time:
//     dx = the block's logits once more, turned into their gradient in the epilogue       (6 MiB)
//     grad_input[tokens] += dx weight[classes],  grad_weight[classes] += dx^T input[tokens],  grad_bias += sums of dx
//
//   Of a shard of the classes the same, but that the forward ends in what it knows of each token, and that the backward
//   is given the factors of a token's gradient instead of making them from its loss.
//
//   Memory beside inputs and outputs: blocks of fixed size, about 150 bytes a labelled token, and for bf16 one float32
//   copy of grad_input. Multiply-adds: labelled tokens x classes x d forward, three times that backward; an exponential
//   costs some 15 instructions a vector, against d / 2 for its logits. Limit: the multiply-add units, or with few
//   labels reading the weight, once forward and twice backward.
#include "ops/linear_cross_entropy.h"

#include "cpu/linear_logits.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kStripTiles = 8, kStrip = kStripTiles * kTileColumns;
constexpr int64_t kBlockBytes = 1024 * kClasses * 4;

struct Forward : Logits<ops::LinearCrossEntropyForward> {
  // of the logits of one row in one tile, or in all tiles so far
  struct Part {
    LogSumExp lse;
    double weighted = 0.0;
  };
  std::vector<Part> parts, totals;  // (labelled, kStripTiles), (labelled,)
  std::vector<float> of_target;     // (labelled,): the target's logit

  explicit Forward(const ops::LinearCrossEntropyForward& params)
      : Logits(params, "linear_cross_entropy", params.statistics.defined()),
        parts(labelled.size() * kStripTiles),
        totals(labelled.size()),
        of_target(labelled.size()) {}

  void run() {
    const int64_t rows = static_cast<int64_t>(labelled.size());
    for (int64_t first = 0; first < classes && rows; first += kStrip) {
      const int64_t n = std::min(kStrip, classes - first);
      tiles(0, rows, first, n, [&](const Tile& tile) {
        for (int64_t r = 0; r < tile.rows; ++r) add(tile, r, first + tile.column);
      });
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t tile = 0; tile * kTileColumns < n; ++tile) {
          const Part& part = parts[row * kStripTiles + tile];
          totals[row].lse.add(part.lse);
          totals[row].weighted += part.weighted;
        }
      }
    }
    p.statistics.defined() ? tell() : finish();
  }

 private:
  void add(const Tile& tile, int64_t r, int64_t first) {
    float* z = tile.c[0] + r * tile.stride;
    if (cap.active()) for_lanes(tile.columns, [&](int64_t i, auto n) { store_n(z + i, cap(load_n(z + i, n)), n); });
    const int64_t row = tile.row + r, y = target(labelled[row]) - first;
    if (y >= 0 && y < tile.columns) of_target[row] = z[y];
    Part part;
    part.lse.add(z, tile.columns);
    if (p.label_smoothing > 0) {
      part.weighted = weighted_sum(token.weight ? token.weight + first : nullptr, z, tile.columns);
    }
    parts[row * kStripTiles + tile.column / kTileColumns] = part;
  }

  void finish() const {
    float *losses = p.losses.as<float>(), *lse = p.lse.as<float>();
    std::fill_n(losses, p.input.size(0), 0.0f);
    std::fill_n(lse, p.input.size(0), 0.0f);
    for (size_t i = 0; i < labelled.size(); ++i) {
      const int64_t row = labelled[i];
      const double exact = totals[i].lse.value();
      lse[row] = static_cast<float>(exact);
      losses[row] = token.value(target(row), exact, of_target[i], totals[i].weighted);
    }
    reduce_losses(p, token);
  }

  void tell() const {
    const int64_t tokens = p.input.size(0);
    float* to = p.statistics.as<float>();
    std::fill_n(to, tokens, -INFINITY);
    std::fill_n(to + tokens, 3 * tokens, 0.0f);
    for (size_t i = 0; i < labelled.size(); ++i) {
      const int64_t row = labelled[i];
      to[row] = totals[i].lse.largest;
      to[tokens + row] = totals[i].lse.total;
      to[2 * tokens + row] = of_target[i];
      to[3 * tokens + row] = static_cast<float>(totals[i].weighted);
    }
  }
};

struct Backward : Logits<ops::LinearCrossEntropyBackward> {
  const LogitsGradient gradient{token, cap};
  const double scale = loss_scale(p);
  // Of bf16 input, where such products are quicker than those of floats, dx is one too: as PyTorch's, whose logits
  // also are.
  const bool in_pairs = kPairsPay && p.input.dtype == DType::bf16;
  const DType dx_type = in_pairs ? DType::bf16 : DType::f32;
  const int64_t block_tokens = kBlockBytes / kClasses / size_of(dx_type);
  // the block's dx, rows kClasses apart; (kClasses, d): its share of grad_linear_weight, where several blocks add up to
  // what is not float32
  float *dx = nullptr, *weight_sums = nullptr;

  explicit Backward(const ops::LinearCrossEntropyBackward& params)
      : Logits(params, "linear_cross_entropy backward", params.factors.defined()) {}

  void run() {
    const bool several = static_cast<int64_t>(labelled.size()) > block_tokens;
    const bool rounded = several && p.grad_linear_weight.defined() && p.grad_linear_weight.dtype != DType::f32;
    static thread_local Scratch scratch;
    const auto [block, sums] = scratch.take(kBlockBytes / 4, rounded ? kClasses * d : 0);
    dx = block, weight_sums = rounded ? sums : nullptr;
    for (int64_t first = 0; first < classes; first += kClasses) {
      const int64_t n = std::min(kClasses, classes - first), count = static_cast<int64_t>(labelled.size());
      for (int64_t row = 0; row < std::max<int64_t>(count, 1); row += block_tokens) {
        run_block(row, std::min(block_tokens, count - row), first, n);
      }
      if (rounded) {
        parallel_each(n, [&](int64_t row) { round_row(weight_sums + row * d, p.grad_linear_weight, first + row); });
      }
    }
    finish_grad_input(*this);
  }

 private:
  void run_block(int64_t row, int64_t rows, int64_t first, int64_t n) const {
    tiles(row, rows, first, n, [&](const Tile& tile) {
      for (int64_t r = 0; r < tile.rows; ++r) write_dx(tile, r, row, first + tile.column);
    });
    const TensorView weight = rows_of(p.linear_weight, first, n);
    const int64_t* index = labelled.data() + row;
    const bool later = row > 0, add = later || p.add_linear_weight;
    if (p.grad_input.defined()) {
      gemm(rows, d, {{dx_matrix(), Matrix(weight), n}}, [&](const Tile& tile) {
        gather_tile(tile, first > 0, p.sums.as<float>(), d, [&](int64_t r) { return index[r]; });
      });
    }
    if (p.grad_linear_weight.defined()) {
      const TensorView out = rows_of(p.grad_linear_weight, first, n);
      float* to = weight_sums ? weight_sums : out.dtype == DType::f32 ? out.as<float>() : nullptr;
      const auto store = [&](const Tile& tile) {
        if (!to) return store_tile(tile, out);
        gather_tile(tile, add, to, weight_sums ? d : out.stride(0), [](int64_t r) { return r; });
      };
      gemm(n, d, {{dx_matrix().t(), Matrix(p.input).gathered(index), rows}}, store,
           weight_sums ? Destination{} : Destination(out));
    }
    if (p.grad_linear_bias.defined()) {
      visit_dx([&](auto* at) { column_sums(at, kClasses, rows, n, later, p.grad_linear_bias.as<float>() + first); });
    }
  }

  void write_dx(const Tile& tile, int64_t r, int64_t first_row, int64_t first) const {
    const int64_t row = labelled[first_row + tile.row + r];
    const float lse = p.lse.as<float>()[row];
    const auto factors = p.factors.defined() ? given_factors(row) : factors_of_loss(row, lse);
    visit_dx([&](auto* at) {
      gradient(tile.c[0] + r * tile.stride, at + (tile.row + r) * kClasses + tile.column, first, tile.columns,
               target(row), lse, factors);
    });
  }

  ops::TokenLoss::Gradient factors_of_loss(int64_t row, float lse) const {
    const int64_t upstream = p.grad_loss.ndim ? row * p.grad_loss.stride(0) : 0;
    return token.gradient(target(row), lse, p.grad_loss.as<float>()[upstream] * scale);
  }
  ops::TokenLoss::Gradient given_factors(int64_t row) const {
    const int64_t tokens = p.input.size(0);
    const float* of_row = p.factors.as<float>() + row;
    return {of_row[0], of_row[tokens], of_row[2 * tokens]};
  }

  Matrix dx_matrix() const {
    Matrix block(dx, kClasses);
    block.dtype = dx_type;
    return block;
  }
  template <class Body>
  void visit_dx(const Body& body) const {
    visit_float(dx_type, [&]<class T>(T) { body(static_cast<T*>(static_cast<void*>(dx))); });
  }
};

void linear_cross_entropy_forward(const ops::LinearCrossEntropyForward& p) { Forward(p).run(); }
void linear_cross_entropy_backward(const ops::LinearCrossEntropyBackward& p) { Backward(p).run(); }

const Registrar<ops::LinearCrossEntropyForward> forward{linear_cross_entropy_forward};
const Registrar<ops::LinearCrossEntropyBackward> backward{linear_cross_entropy_backward};
const Registrar<ops::LinearCrossEntropyShardForward<ops::LinearCrossEntropyForward>> shard_forward{
    [](const auto& p) { Forward(p).run(); }};
const Registrar<ops::LinearCrossEntropyShardBackward<ops::LinearCrossEntropyBackward>> shard_backward{
    [](const auto& p) { Backward(p).run(); }};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
