// Plain products: out = a b + a2 b2 + bias + added, b^T of gemm_sm80.cuh being b here (algorithm, flops and limit:
// there).
//
//   bytes   beside the operands, out once, and `added` read once: 4 bytes an element. Stores are of 16 bytes.
#include <cstdint>

#include "cuda/gemm.h"
#include "cuda/gemm_host.h"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

template <class T, bool a_across, bool b_across>
struct Product {
  gemm::Operand<T, a_across> a;
  gemm::Operand<T, b_across> b;
  gemm::Operand<T, a_across> a2;
  gemm::Operand<T, b_across> b2;
  int depth, products, row_tiles, column_tiles;
  Line bias;
  Rows<const float> added;
  Rows<T> out;  // one of the two
  Rows<float> out_wide;

  __device__ __forceinline__ void store(int row, int column, float (&x)[8]) const {
    add_line<T>(bias, column, b.lines, x);
    if (added.data) {
      float y[8];
      load_floats(added[row], column, b.lines, added.aligned, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += y[i];
    }
    if (out.data) {
      store_vector(out[row], column, b.lines, out.aligned, pack<T>(x));
    } else {
      store_floats(out_wide[row], column, b.lines, out_wide.aligned, x);
    }
  }
};

template <class T, bool a_across, bool b_across>
__global__ void __launch_bounds__(gemm::kThreads, 2) gemm_sm80(const Product<T, a_across, b_across> p) {
  const gemm::Place tile = gemm::place_of(static_cast<int>(blockIdx.x), p.row_tiles, p.column_tiles);
  const int row = tile.row * gemm::kTile, column = tile.column * gemm::kTile;
  void* shared = ptx::dynamic_shared();
  gemm::Accumulators c;
  clear(c);
#pragma unroll 1
  for (int i = 0; i < p.products; ++i) {
    if (i > 0) __syncthreads();  // every warp is done with the first product's stages
    gemm::multiply_add<T>(c, shared, i == 0 ? p.a : p.a2, i == 0 ? p.b : p.b2, row, column, p.depth);
  }
  gemm::each_vector<1>(c, shared, [&](int r, int v, float (&x)[1][8]) {
    if (row + r < p.a.lines) p.store(row + r, column + v, x[0]);
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

void validate(const Gemm& p) {
  const Checker at{"gemm"};
  at.defined(p.a, "a");
  at.defined(p.b, "b");
  at.defined(p.out, "out");
  at.dtype(p.a, "a", kProductTypes);
  at.dtype(p.b, "b", {p.a.dtype});
  if (p.a.ndim != 2) at.fail_at("a", "must be (m, k), got " + p.a.shape());
  if (p.b.ndim != 2) at.fail_at("b", "must be (k, n), got " + p.b.shape());
  const int64_t m = p.a.size(0), k = p.a.size(1), n = p.b.size(1);
  at.shape(p.b, "b", {k, n});
  if (!gemm::lies_along(p.a) && !gemm::lies_across(p.a)) at.fail_at("a", "must have a unit stride");
  if (!gemm::lies_along(p.b) && !gemm::lies_across(p.b)) at.fail_at("b", "must have a unit stride");
  if (!gemm::lies_along(p.a) && !gemm::lies_along(p.b)) {
    at.fail_at("b", "must have last stride 1 where a has not, got " + std::to_string(p.b.stride(1)));
  }
  if (p.a2.defined() != p.b2.defined()) at.fail_at("b2", "is wanted with a2, and only with it");
  for (auto [t, like, argument] : {std::tuple{&p.a2, &p.a, "a2"}, std::tuple{&p.b2, &p.b, "b2"}}) {
    at.dtype(*t, argument, {p.a.dtype});
    at.shape(*t, argument, {like->size(0), like->size(1)});
    const bool along = gemm::lies_along(*like);
    if (t->defined() && !(along ? gemm::lies_along(*t) : gemm::lies_across(*t))) {
      at.fail_at(argument, "must have its unit stride where the first operand has");
    }
  }
  at.dtype(p.bias, "bias", {p.a.dtype, DType::f32});
  at.shape(p.bias, "bias", {n});
  at.contiguous(p.bias, "bias");
  at.dtype(p.added, "added", {DType::f32});
  at.shape(p.added, "added", {m, n});
  at.unit_last_stride(p.added, "added");
  at.dtype(p.out, "out", {p.a.dtype, DType::f32});
  at.shape(p.out, "out", {m, n});
  at.unit_last_stride(p.out, "out");
}

void run(const Gemm& p, Stream stream) {
  const int64_t m = p.a.size(0), n = p.b.size(1), k = p.a.size(1);
  gemm::check_sizes("gemm", {m, n, k});
  const int row_tiles = gemm::tiles_of(m), column_tiles = gemm::tiles_of(n);
  const LaunchSite at = gemm::site("gemm_sm80", gemm::blocks_of("gemm", row_tiles, column_tiles), p.a, stream);
  visit(p, [&]<class T, bool a_across, bool b_across>(T, std::bool_constant<a_across>, std::bool_constant<b_across>) {
    const bool wide = p.out.dtype == DType::f32;
    const Product<T, a_across, b_across> given{gemm::operand_of<T, a_across>(p.a),
                                               gemm::operand_of<T, b_across>(transposed(p.b)),
                                               gemm::operand_of<T, a_across>(p.a2.defined() ? p.a2 : p.a),
                                               gemm::operand_of<T, b_across>(transposed(p.b2.defined() ? p.b2 : p.b)),
                                               static_cast<int>(k),
                                               p.a2.defined() ? 2 : 1,
                                               row_tiles,
                                               column_tiles,
                                               line_of(p.bias),
                                               rows_of<const float>(p.added),
                                               wide ? Rows<T>{} : rows_of<T>(p.out),
                                               wide ? rows_of<float>(p.out) : Rows<float>{}};
    launch(at, gemm_sm80<T, a_across, b_across>, given);
  });
}

}  // namespace llmengine::cuda
