// Plain products on Hopper: out = a b + a2 b2 + bias + added (algorithm, flops and limit: gemm_sm90a.cuh).
//
//   Results of 16 bits that TMA can store go by boxes, with 128 columns a tile where there are no more; others, of
//   float32, with a matrix added, in parts of k, or whose rows begin anywhere, by vectors of eight columns.
#include <cstdint>
#include <string>

#include "cuda/gemm_host.h"
#include "cuda/gemm_result.cuh"
#include "cuda/gemm_sm90a_host.h"
#include "cuda/tensor_map.h"

namespace llmengine::cuda {
namespace {

using namespace gemm_sm90a;

struct ToBoxes {
  Operands operands;
  ptx::TensorMap out;
  Tiles tiles;
  Line bias;
  int columns;
};

template <class T, int columns, bool a_across, bool b_across>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90a_boxes(const __grid_constant__ ToBoxes p) {
  auto& shared = *static_cast<Shared<columns>*>(ptx::dynamic_shared_1024());
  multiply<T, columns, a_across, b_across, false>(shared, p.operands, p.tiles,
                                                  StoreBoxes<T>{{}, p.out, p.bias, p.columns});
}

template <class T>
struct ToVectors {
  Operands operands;
  Tiles tiles;
  Result<T> to;
};

template <class T>
struct StoreVectors : NoBeginNorEnd {
  const Result<T>& to;

  __device__ explicit StoreVectors(const Result<T>& result) : to(result) {}

  template <int count>
  __device__ __forceinline__ void finish(float (&d)[count], Room& room, const Place& place) {
    const auto load = [&](int r, int v) { return to.load(place.row + r, place.column + v); };
    const auto store = [&](int r, int v, float (&x)[1][8], const typename Result<T>::Added& added) {
      to.store(place.row + r, place.column + v, place.part, x[0], added);
    };
    each_vector<1, kAddedAhead>(d, room, load, store, [](int) {});
  }
};

template <class T, bool a_across, bool b_across>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90a_vectors(const __grid_constant__ ToVectors<T> p) {
  auto& shared = *static_cast<Shared<kColumns>*>(ptx::dynamic_shared_1024());
  multiply<T, kColumns, a_across, b_across, false>(shared, p.operands, p.tiles, StoreVectors<T>(p.to));
}

// ---- launches -------------------------------------------------------------------------------------------------------

bool lies_along(const TensorView& t) { return !t.defined() || gemm::lies_along(t); }

template <int columns, bool a_across, bool b_across>
Operands operands_of_product(const Gemm& p) {
  return operands_of(p.a, a_across, transposed(p.b), b_across, columns, p.a2,
                     p.b2.defined() ? transposed(p.b2) : TensorView{});
}

template <int columns>
Tiles tiles_of_product(const Gemm& p) {
  return tiles_of(p.out.size(0), p.out.size(1), p.a.size(1), columns, p.a2.defined() ? 2 : 1);
}

template <class T, int columns, bool a_across, bool b_across>
void launch_boxes(const Gemm& p, Stream stream) {
  const ToBoxes given{operands_of_product<columns, a_across, b_across>(p),
                      ptx::encode_tensor_map(tensor_map_fields("out", p.out, {64, kPanel}, Swizzle::bytes_128)),
                      tiles_of_product<columns>(p), line_of(p.bias), static_cast<int>(p.out.size(1))};
  launch(site("gemm_sm90a", given.tiles, p.out, sizeof(Shared<columns>), stream),
         gemm_sm90a_boxes<T, columns, a_across, b_across>, given);
}

template <class T, bool a_across, bool b_across>
void launch_vectors(const Gemm& p, Stream stream) {
  Tiles tiles = tiles_of_product<kColumns>(p);
  tiles.parts = parts_of(p, int64_t{tiles.rows} * tiles.columns, clusters_at_once(), kDepth);
  const ToVectors<T> given{operands_of_product<kColumns, a_across, b_across>(p), tiles,
                           tiles.parts > 1 ? parts_result_of<T>(p) : result_of<T>(p)};
  launch(site("gemm_sm90a", tiles, p.out, sizeof(Shared<kColumns>), stream), gemm_sm90a_vectors<T, a_across, b_across>,
         given);
  if (tiles.parts > 1) add_parts(p, tiles.parts, stream);
}

bool goes_by_boxes(const Gemm& p) {
  const Tiles tiles = tiles_of_product<kColumns>(p);
  return p.out.dtype != DType::f32 && !p.added.defined() && !p.goes_on && p.ends && tensor_map_refuses(p.out).empty() &&
         p.out.size(1) > 1 && parts_of(p, int64_t{tiles.rows} * tiles.columns, clusters_at_once(), kDepth) == 1;
}

template <class T, bool a_across, bool b_across>
void launch_product(const Gemm& p, Stream stream) {
  if (!goes_by_boxes(p)) return launch_vectors<T, a_across, b_across>(p, stream);
  p.out.size(1) <= 128 ? launch_boxes<T, 128, a_across, b_across>(p, stream)
                       : launch_boxes<T, kColumns, a_across, b_across>(p, stream);
}

}  // namespace

void multiply_sm90a(const Gemm& p, Stream stream) {
  gemm::visit_type(p.a.dtype, [&]<class T>(T) {
    const bool b_along = lies_along(transposed(p.b)) && (!p.b2.defined() || lies_along(transposed(p.b2)));
    if (!lies_along(p.a)) return launch_product<T, true, true>(p, stream);
    b_along ? launch_product<T, false, false>(p, stream) : launch_product<T, false, true>(p, stream);
  });
}

}  // namespace llmengine::cuda
