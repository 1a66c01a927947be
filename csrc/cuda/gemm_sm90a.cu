// The host's side of gemm_sm90a.cuh: from tensors to tensor maps and a grid.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "cuda/gemm_sm90a.cuh"
#include "cuda/gemm_sm90a.h"
#include "cuda/launch.cuh"

namespace llmengine::cuda {

namespace {

using namespace gemm_sm90a;

bool has_unit_stride(const TensorView& t, int dim) { return t.size(dim) <= 1 || t.stride(dim) == 1; }

// A matrix of (lines, k), that lies across k where its lines are contiguous and k is not.
bool lies_across(const TensorView& t) { return !has_unit_stride(t, 1) && has_unit_stride(t, 0); }

TensorView transposed(TensorView t) {
  std::swap(t.sizes[0], t.sizes[1]);
  std::swap(t.strides[0], t.strides[1]);
  return t;
}

// Boxes of an operand (lines, k): lines of 64 k, or 64 lines for each of 64 k.
ptx::TensorMap map_of(const char* name, const TensorView& t, bool across, int lines) {
  const TensorView rows = across ? transposed(t) : t;
  return ptx::encode_tensor_map(
      tensor_map_fields(name, rows, {across ? kDepth : lines, across ? kPanel : kDepth}, Swizzle::bytes_128));
}

int ceil_divide(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

template <class T, int columns, bool a_across, bool b_across>
void launch_product(const GemmSm90a& p, Stream stream) {
  const TensorView b = transposed(p.b);  // (n, k)
  const Tiles tiles{ceil_divide(p.out.size(0), kRows * kCluster), ceil_divide(p.out.size(1), columns),
                    ceil_divide(p.a.size(1), kDepth)};
  const int fit = std::max(multiprocessors() / kCluster, 1);
  const auto blocks = static_cast<unsigned>(std::min(tiles.rows * tiles.columns, fit) * kCluster);
  const LaunchSite site{
      "gemm_sm90a", dim3(blocks), dim3(kThreads), cuda_stream(stream), p.out, sizeof(Shared<columns>), dim3(kCluster)};
  launch(site, gemm_sm90a::gemm_sm90a<T, columns, a_across, b_across>, map_of("a", p.a, a_across, kRows),
         map_of("b", b, b_across, columns / kCluster),
         ptx::encode_tensor_map(tensor_map_fields("out", p.out, {64, kPanel}, Swizzle::bytes_128)), tiles);
}

template <class T, int columns>
void launch_layout(const GemmSm90a& p, Stream stream) {
  const bool a_across = lies_across(p.a), b_across = lies_across(transposed(p.b));
  if (a_across && b_across) return launch_product<T, columns, true, true>(p, stream);
  if (a_across) return launch_product<T, columns, true, false>(p, stream);
  if (b_across) return launch_product<T, columns, false, true>(p, stream);
  launch_product<T, columns, false, false>(p, stream);
}

template <class T>
void launch_type(const GemmSm90a& p, Stream stream) {
  p.out.size(1) <= 128 ? launch_layout<T, 128>(p, stream) : launch_layout<T, 256>(p, stream);
}

}  // namespace

void validate(const GemmSm90a& p) {
  const Checker check{"gemm_sm90a"};
  check.defined(p.a, "a"), check.defined(p.b, "b"), check.defined(p.out, "out");
  check.dtype(p.a, "a", {DType::bf16, DType::f16});
  check.dtype(p.b, "b", {p.a.dtype});
  check.dtype(p.out, "out", {p.a.dtype});
  if (p.a.ndim != 2) check.fail_at("a", "has shape " + p.a.shape() + "; allowed: two dimensions");
  if (p.b.ndim != 2) check.fail_at("b", "has shape " + p.b.shape() + "; allowed: two dimensions");
  const int64_t m = p.a.size(0), k = p.a.size(1), n = p.b.size(1);
  check.shape(p.b, "b", {k, n});
  check.shape(p.out, "out", {m, n});
  if (k == 0) check.fail_at("a", "has shape " + p.a.shape() + "; allowed: at least one column");
  for (const auto& [t, name] : NamedTensors{{&p.a, "a"}, {&p.b, "b"}}) {
    if (has_unit_stride(*t, 0) || has_unit_stride(*t, 1)) continue;
    check.fail_at(name, "has strides in both dimensions; allowed: a unit stride in one");
  }
  for (const int64_t size : {m, n, k}) {
    if (size > std::numeric_limits<int>::max() / 2) {
      check.fail_at("a", "and b have a size of " + std::to_string(size) + "; allowed: up to 2^30");
    }
  }
}

void run(const GemmSm90a& p, Stream stream) {
  validate(p);
  if (p.out.numel() == 0) return;
  if (const int found = compute_capability(); found != 90) {
    throw std::runtime_error("gemm_sm90a: the device has compute capability " + std::to_string(found / 10) + "." +
                             std::to_string(found % 10) + "; allowed: 9.0");
  }
  p.a.dtype == DType::bf16 ? launch_type<bf16>(p, stream) : launch_type<f16>(p, stream);
}

}  // namespace llmengine::cuda
