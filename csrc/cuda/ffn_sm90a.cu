// The products of the feed-forward block whose epilogues are its own, on Hopper (the block: ffn_products.cu; products:
// gemm_sm90a.cuh).
//
//   hidden_product   of a gated block, a tile of 256 columns is 128 hidden units of w_up and the same of w_gate, a
//                    `pair`: one block of a cluster fetches the ones for both, the other the others
//   hidden_gradient  without a gate a thread asks for four pre-activations before it turns the first; sums over 64
//                    tokens, for the biases, are a warpgroup's
//
//   limit   the tensor cores, which stand still in an epilogue: of the forward, 128 hidden units a thread at 10 to 30
//           operations, two warps a scheduler, 3 to 8 thousand clocks beside 16 d for a tile's products
#include "cuda/ffn_products.cuh"
#include "cuda/gemm_host.h"
#include "cuda/gemm_sm90a_host.h"

namespace llmengine::cuda {
namespace {

using namespace gemm_sm90a;

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct ProductOfHidden {
  Operands operands;
  Tiles tiles;
  ffn::Hidden<T> to;
};

template <class T, int sides>
struct FinishHidden : NoBeginNorEnd {
  const ffn::Hidden<T>& to;
  uint64_t seed;

  __device__ explicit FinishHidden(const ffn::Hidden<T>& hidden) : to(hidden), seed(ffn::seed_of(hidden.dropout)) {}

  template <int count>
  __device__ __forceinline__ void finish(float (&d)[count], Room& room, const Place& place) {
    each_vector<sides>(d, room, [&](int r, int v, float (&x)[sides][8]) {
      ffn::finish_hidden(to, seed, place.row + r, place.column / sides + v, x);
    });
  }
};

template <class T, bool gated>
__global__ void __launch_bounds__(kThreads, 1) hidden_product_sm90a(const __grid_constant__ ProductOfHidden<T> p) {
  auto& shared = *static_cast<Shared<kColumns>*>(ptx::dynamic_shared_1024());
  multiply<T, kColumns, false, false, gated>(shared, p.operands, p.tiles, FinishHidden<T, gated ? 2 : 1>(p.to));
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct ProductOfGradient {
  Operands operands;
  Tiles tiles;
  ffn::Gradient<T> to;
};

template <class T, bool gated>
struct FinishGradient : NoBeginNorEnd {
  const ffn::Gradient<T>& to;
  uint64_t seed;

  __device__ explicit FinishGradient(const ffn::Gradient<T>& gradient)
      : to(gradient), seed(ffn::seed_of(gradient.dropout)) {}

  template <int count>
  __device__ __forceinline__ void finish(float (&d)[count], Room& room, const Place& place) {
    constexpr int kAhead = gated ? 1 : ffn::kAhead;  // beside two lines of sums no registers are left
    float sum_up[8] = {}, sum_gate[8] = {};
    const auto load = [&](int r, int v) {
      return ffn::load_pre_activations<T, gated>(to, place.row + r, place.column + v);
    };
    const auto turn = [&](int r, int v, float (&x)[1][8], const ffn::PreActivations& saved) {
      ffn::add_gradients<T, gated>(to, seed, place.row + r, place.column + v, saved, x[0], sum_up, sum_gate);
    };
    const auto add_up = [&](const Rows<float>& partial, float (&sums)[8], int column) {
      if (!partial.data) return;
      const int line = place.row / 64, columns = line < to.lines ? to.columns : 0;
      store_column_sums(sums, room, partial[line], column, columns, partial.aligned);
    };
    each_vector<1, kAhead>(d, room, load, turn, [&](int v) {
      add_up(to.partial_up, sum_up, place.column + v);
      if constexpr (gated) add_up(to.partial_gate, sum_gate, place.column + v);
    });
  }
};

template <class T, bool gated>
__global__ void __launch_bounds__(kThreads, 1) hidden_gradient_sm90a(const __grid_constant__ ProductOfGradient<T> p) {
  auto& shared = *static_cast<Shared<kColumns>*>(ptx::dynamic_shared_1024());
  multiply<T, kColumns, false, true, false>(shared, p.operands, p.tiles, FinishGradient<T, gated>(p.to));
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <class T, bool gated>
void launch_forward(const FeedForwardForward& p, Stream stream) {
  const int64_t columns = (gated ? 2 : 1) * p.w_up.size(0);
  const ProductOfHidden<T> given{operands_of(p.input, false, p.w_up, false, kColumns, {}, p.w_gate),
                                 tiles_of(p.input.size(0), columns, p.input.size(1)), ffn::hidden_of<T>(p)};
  launch(site("hidden_product_sm90a", given.tiles, p.input, sizeof(Shared<kColumns>), stream),
         hidden_product_sm90a<T, gated>, given);
}

template <class T, bool gated>
void launch_backward(const FeedForwardBackward& p, Stream stream) {
  const ProductOfGradient<T> given{operands_of(p.grad_output, false, transposed(p.w_down), true),
                                   tiles_of(p.input.size(0), p.w_up.size(0), p.input.size(1)), ffn::gradient_of<T>(p)};
  launch(site("hidden_gradient_sm90a", given.tiles, p.input, sizeof(Shared<kColumns>), stream),
         hidden_gradient_sm90a<T, gated>, given);
}

}  // namespace

void hidden_product_sm90a(const FeedForwardForward& p, Stream stream) {
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    p.w_gate.defined() ? launch_forward<T, true>(p, stream) : launch_forward<T, false>(p, stream);
  });
}

void hidden_gradient_sm90a(const FeedForwardBackward& p, Stream stream) {
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    p.w_gate.defined() ? launch_backward<T, true>(p, stream) : launch_backward<T, false>(p, stream);
  });
}

}  // namespace llmengine::cuda
