// The products of the feed-forward block whose epilogues are its own, on every GPU from sm_80 on (the block:
// ffn_products.cu; products: gemm_sm80.cuh).
//
//   hidden_product   of a gated block, a tile of 128 tokens has 64 hidden units of w_up and the same of w_gate, and a
//                    thread both sums of a unit
//   hidden_gradient  with d = 1024 its epilogue moves 96 KiB for 2^25 flops a tile, and the other block of the
//                    multiprocessor multiplies meanwhile
#include <type_traits>

#include "cuda/ffn_products.cuh"
#include "cuda/gemm.h"
#include "cuda/gemm_host.h"

namespace llmengine::cuda {
namespace {

template <class T>
using Inputs = gemm::Operand<T, false>;

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T, bool gated>
struct Forward {
  Inputs<T> input;
  std::conditional_t<gated, gemm::Pair<T>, Inputs<T>> weight;
  int depth, row_tiles, column_tiles;
  ffn::Hidden<T> to;
};

template <class T, bool gated>
__global__ void __launch_bounds__(gemm::kThreads, 2) hidden_product(const Forward<T, gated> p) {
  constexpr int sides = gated ? 2 : 1;
  const gemm::Place tile = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.column_tiles);
  const int row = tile.row * gemm::kTile, column = tile.column * gemm::kTile;
  void* shared = ptx::dynamic_shared();
  gemm::Accumulators c;
  clear(c);
  gemm::multiply_add<T>(c, shared, p.input, p.weight, row, column, 0, p.depth);
  const uint64_t seed = ffn::seed_of(p.to.dropout);
  gemm::each_vector<sides>(c, shared, [&](int r, int v, float (&x)[sides][8]) {
    ffn::finish_hidden(p.to, seed, row + r, column / sides + v, x);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Inputs<T> grad_output;
  gemm::Operand<T, true> w_down;
  int depth, row_tiles, column_tiles;
  ffn::Gradient<T> to;
};

template <class T, bool gated>
__global__ void __launch_bounds__(gemm::kThreads, 2) hidden_gradient(const Backward<T> p) {
  const gemm::Place tile = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.column_tiles);
  const int row = tile.row * gemm::kTile, column = tile.column * gemm::kTile;
  void* shared = ptx::dynamic_shared();
  gemm::Accumulators c;
  clear(c);
  gemm::multiply_add<T>(c, shared, p.grad_output, p.w_down, row, column, 0, p.depth);
  const uint64_t seed = ffn::seed_of(p.to.dropout);
  float sum_up[8] = {}, sum_gate[8] = {};
  const auto load = [&](int r, int v) { return ffn::load_pre_activations<T, gated>(p.to, row + r, column + v); };
  gemm::each_vector<1, ffn::kAhead>(
      c, shared, load, [&](int r, int v, float (&x)[1][8], const ffn::PreActivations& saved) {
        ffn::add_gradients<T, gated>(p.to, seed, row + r, column + v, saved, x[0], sum_up, sum_gate);
      });
  const int64_t line = 2 * static_cast<int64_t>(tile.row) + warp_of() / 2;
  const Rows<float>&up = p.to.partial_up, &gate = p.to.partial_gate;
  if (up.data) gemm::store_column_sums(sum_up, up[line], column, p.to.columns, up.aligned);
  if (gated && gate.data) gemm::store_column_sums(sum_gate, gate[line], column, p.to.columns, gate.aligned);
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <class T, bool gated>
void launch_forward(const FeedForwardForward& p, Stream stream) {
  const int row_tiles = gemm::tiles_of(p.input.size(0));
  const int column_tiles = gemm::tiles_of(p.w_up.size(0), gated ? gemm::kTile / 2 : gemm::kTile);
  Forward<T, gated> given{};
  given.input = gemm::operand_of<T, false>(p.input);
  if constexpr (gated) {
    given.weight = {gemm::operand_of<T, false>(p.w_up), gemm::operand_of<T, false>(p.w_gate)};
  } else {
    given.weight = gemm::operand_of<T, false>(p.w_up);
  }
  given.depth = static_cast<int>(p.input.size(1));
  given.row_tiles = row_tiles, given.column_tiles = column_tiles;
  given.to = ffn::hidden_of<T>(p);
  launch(gemm::site("hidden_product", gemm::blocks_of("ffn", row_tiles, column_tiles), p.input, stream),
         hidden_product<T, gated>, given);
}

template <class T, bool gated>
void launch_backward(const FeedForwardBackward& p, Stream stream) {
  const int row_tiles = gemm::tiles_of(p.input.size(0)), column_tiles = gemm::tiles_of(p.w_up.size(0));
  Backward<T> given{};
  given.grad_output = gemm::operand_of<T, false>(p.grad_output);
  given.w_down = gemm::operand_of<T, true>(transposed(p.w_down));
  given.depth = static_cast<int>(p.input.size(1));
  given.row_tiles = row_tiles, given.column_tiles = column_tiles;
  given.to = ffn::gradient_of<T>(p);
  launch(gemm::site("hidden_gradient", gemm::blocks_of("ffn backward", row_tiles, column_tiles), p.input, stream),
         hidden_gradient<T, gated>, given);
}

}  // namespace

void hidden_product_sm80(const FeedForwardForward& p, Stream stream) {
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    p.w_gate.defined() ? launch_forward<T, true>(p, stream) : launch_forward<T, false>(p, stream);
  });
}

void hidden_gradient_sm80(const FeedForwardBackward& p, Stream stream) {
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    p.w_gate.defined() ? launch_backward<T, true>(p, stream) : launch_backward<T, false>(p, stream);
  });
}

}  // namespace llmengine::cuda
