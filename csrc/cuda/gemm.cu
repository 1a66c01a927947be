// Products of matrices: which core makes one (gemm_sm80.cu, gemm_sm90a.cu), into how many parts its k is cut, and the
// sum of those.
//
//   A product of few tiles and a deep k, a weight's gradient or one of few tokens, leaves multiprocessors without work.
//   Its k is then cut into parts, which are tiles of their own with float32 sums in `room`, and add_parts adds those up
//   in order: no atomics, equal bits on every run. A thread has eight columns of a row.
//
//   bytes   beside the product: 8 a part and element of out
//   limit   memory bandwidth, at most tiles x parts = slots: 17 MB written and read on an H100, most of it in the
//           second-level cache
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda/gemm_cores.h"
#include "cuda/gemm_host.h"
#include "cuda/gemm_result.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_shape.h"
#include "cuda/tensor_map.h"

namespace llmengine::cuda {
namespace {

constexpr int kPartLines = 8;  // warps of a block that adds parts up

thread_local std::vector<std::string> left;  // to the other core, and why

template <class T>
__global__ void __launch_bounds__(32 * kPartLines)
    gemm_add_parts(const Rows<const float> room, int parts, int64_t part_stride, const Result<T> to) {
  const int column = static_cast<int>(blockIdx.y * 32 + threadIdx.x) * 8;
  for (int row = static_cast<int>(blockIdx.x) * kPartLines + threadIdx.y; row < to.rows;
       row += static_cast<int>(gridDim.x) * kPartLines) {
    float x[8] = {};
#pragma unroll 2
    for (int part = 0; part < parts; ++part) {
      float y[8];
      load_floats(room[row] + part * part_stride, column, to.columns, room.aligned, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += y[i];
    }
    to.store(row, column, 0, x, to.load(row, column));
  }
}

}  // namespace

std::string hopper_refuses(const std::string& core, const NamedTensors& matrices) {
  if (core != "sm90a") return "the core of gemm_sm80.cuh was asked for";
  check_is_hopper("products by sm90a");
  for (const auto& [matrix, name] : matrices) {
    if (!matrix->defined()) continue;
    const std::string reason = tensor_map_refuses(gemm::lies_along(*matrix) ? *matrix : transposed(*matrix));
    if (reason.empty()) continue;
    left.push_back(std::string(name) + " " + matrix->shape() + ": " + reason);
    return left.back();
  }
  return "";
}

std::vector<std::string> take_left() { return std::exchange(left, {}); }

void check_core(const Checker& at, const std::string& core, const TensorView& room) {
  if (core != "sm80" && core != "sm90a") at.fail_at("core", "is '" + core + "'; allowed: 'sm80', 'sm90a'");
  at.dtype(room, "room", {DType::f32});
  at.contiguous(room, "room");
}

int parts_of(const Gemm& p, int64_t tiles, int64_t slots, int depth, int least) {
  if (!p.room.defined() || p.a2.defined() || tiles == 0 || 2 * tiles > slots) return 1;
  const int64_t k = p.a.size(1), steps = (k + depth - 1) / depth, mn = p.out.numel();
  const int64_t most = std::min({slots / tiles, k / least, p.room.numel() / mn});
  if (most <= 1) return 1;
  const int64_t each = (steps + most - 1) / most;
  return static_cast<int>((steps + each - 1) / each);  // none is empty
}

void add_parts(const Gemm& p, int parts, Stream stream) {
  const int64_t m = p.out.size(0), n = p.out.size(1), lines = (n + 255) / 256;
  check(lines <= 65535, "gemm: " + std::to_string(n) + " columns in parts are not supported on CUDA");
  const LaunchSite at{"gemm_add_parts", dim3(grid_of(m, kPartLines), static_cast<unsigned>(lines)),
                      dim3(32, kPartLines), cuda_stream(stream), p.out};
  gemm::visit_type(p.a.dtype, [&]<class T>(T) {
    const Rows<float> room = parts_result_of<T>(p).out_wide;
    launch(at, gemm_add_parts<T>, Rows<const float>{room.data, room.stride, room.aligned}, parts, m * n,
           result_of<T>(p));
  });
}

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
  at.dtype(p.added, "added", {p.a.dtype, DType::f32});
  at.shape(p.added, "added", {m, n});
  at.unit_last_stride(p.added, "added");
  at.dtype(p.out, "out", {p.a.dtype, DType::f32});
  at.shape(p.out, "out", {m, n});
  at.unit_last_stride(p.out, "out");
  at.dtype(p.low, "low", {DType::boolean});
  at.shape(p.low, "low", {m, n});
  at.contiguous(p.low, "low");
  if ((p.goes_on || !p.ends) && (!p.low.defined() || p.out.dtype == DType::f32 || p.added.defined())) {
    at.fail_at("low", "is wanted, with an `out` of 16 bits and nothing added, by sums of several products");
  }
  check_core(at, p.core, p.room);
}

void run(const Gemm& p, Stream stream) {
  gemm::check_sizes("gemm", {p.a.size(0), p.b.size(1), p.a.size(1)});
  if (p.out.numel() == 0) return;
  bool hopper = hopper_refuses(p.core, {{&p.a, "a"}, {&p.b, "b"}, {&p.a2, "a2"}, {&p.b2, "b2"}}).empty();
  if (hopper && p.a.size(1) == 1) {
    left.push_back("a " + p.a.shape() + ": nothing tells whether a k of 1 lies along its matrices or across them");
    hopper = false;
  }
  hopper ? multiply_sm90a(p, stream) : multiply_sm80(p, stream);
}

}  // namespace llmengine::cuda
