// Plain products: out = a b + a2 b2 + bias + added, b^T of gemm_sm80.cuh being b here (algorithm, flops and limit:
// there). Of few tiles, k is cut into parts (gemm.cu).
//
//   bytes   beside the operands, out once, and `added` read once: 2 or 4 bytes an element. Stores are of 16 bytes.
#include <cstdint>

#include "cuda/gemm.h"
#include "cuda/gemm_cores.h"
#include "cuda/gemm_host.h"
#include "cuda/gemm_result.cuh"

namespace llmengine::cuda {
namespace {

template <class T, bool a_across, bool b_across>
struct Product {
  gemm::Operand<T, a_across> a;
  gemm::Operand<T, b_across> b;
  gemm::Operand<T, a_across> a2;
  gemm::Operand<T, b_across> b2;
  int depth, part_depth, products, row_tiles, column_tiles;
  Result<T> to;
};

template <class T, bool a_across, bool b_across>
__global__ void __launch_bounds__(gemm::kThreads, 2) gemm_sm80(const Product<T, a_across, b_across> p) {
  const int tiles = p.row_tiles * p.column_tiles, part = static_cast<int>(blockIdx.x) / tiles;
  const gemm::Place tile = gemm::place_of(static_cast<int>(blockIdx.x) % tiles, p.row_tiles, p.column_tiles);
  const int row = tile.row * gemm::kTile, column = tile.column * gemm::kTile;
  const int from = part * p.part_depth, to = from + p.part_depth < p.depth ? from + p.part_depth : p.depth;
  void* shared = ptx::dynamic_shared();
  gemm::Accumulators c;
  clear(c);
#pragma unroll 1
  for (int i = 0; i < p.products; ++i) {
    if (i > 0) __syncthreads();  // every warp is done with the first product's stages
    gemm::multiply_add<T>(c, shared, i == 0 ? p.a : p.a2, i == 0 ? p.b : p.b2, row, column, from, to);
  }
  const auto load = [&](int r, int v) { return p.to.load(row + r, column + v); };
  gemm::each_vector<1, kAddedAhead>(c, shared, load,
                                    [&](int r, int v, float (&x)[1][8], const typename Result<T>::Added& added) {
                                      p.to.store(row + r, column + v, part, x[0], added);
                                    });
}

// body(T{}, whether a lies across, whether b does)
template <class Body>
void visit(const Gemm& p, const Body& body) {
  gemm::visit_type(p.a.dtype, [&]<class T>(T) {
    const TensorView b = transposed(p.b);
    const bool a_along = gemm::lies_along(p.a);
    const bool b_along = gemm::lies_along(b) && (!p.b2.defined() || gemm::lies_along(transposed(p.b2)));
    if (a_along && b_along) {
      body(T{}, std::false_type{}, std::false_type{});
    } else if (a_along) {
      body(T{}, std::false_type{}, std::true_type{});
    } else {
      body(T{}, std::true_type{}, std::true_type{});
    }
  });
}

}  // namespace

void multiply_sm80(const Gemm& p, Stream stream) {
  const int64_t k = p.a.size(1);
  const int row_tiles = gemm::tiles_of(p.a.size(0)), column_tiles = gemm::tiles_of(p.b.size(1));
  const int64_t tiles = static_cast<int64_t>(row_tiles) * column_tiles;
  const int parts = parts_of(p, tiles, 2 * multiprocessors(), gemm::kDepth);
  const int steps = gemm::tiles_of(k, gemm::kDepth), part_depth = (steps + parts - 1) / parts * gemm::kDepth;
  const LaunchSite at =
      gemm::site("gemm_sm80", gemm::blocks_of("gemm", row_tiles * int64_t{parts}, column_tiles), p.a, stream);
  visit(p, [&]<class T, bool a_across, bool b_across>(T, std::bool_constant<a_across>, std::bool_constant<b_across>) {
    const Product<T, a_across, b_across> given{gemm::operand_of<T, a_across>(p.a),
                                               gemm::operand_of<T, b_across>(transposed(p.b)),
                                               gemm::operand_of<T, a_across>(p.a2.defined() ? p.a2 : p.a),
                                               gemm::operand_of<T, b_across>(transposed(p.b2.defined() ? p.b2 : p.b)),
                                               static_cast<int>(k),
                                               part_depth,
                                               p.a2.defined() ? 2 : 1,
                                               row_tiles,
                                               column_tiles,
                                               parts > 1 ? parts_result_of<T>(p) : result_of<T>(p)};
    launch(at, gemm_sm80<T, a_across, b_across>, given);
  });
  if (parts > 1) add_parts(p, parts, stream);
}

}  // namespace llmengine::cuda
