// Products of 8-bit floats on Hopper: out = a b^T + bias + added, scales and all (fp8.h), over the ring of
// gemm_sm90a.cuh.
//
//   A stage's lines are 128 bytes, so 128 of k: those that share a scale. A block has 128 x 128 of out, a warpgroup
//   64 x 128, twice: the products of a stage, four wgmma of 32 of k, and the sums, to which they are added when they
//   are done, times both scales. That is what block scales want, and what a matrix with one scale is better for, too:
//   the tensor cores add 8-bit products with about 14 bits (ptx/wgmma.cuh), and never more than 128 of them here. While
//   one warpgroup adds, the other one's products run.
//
//   A line of a has its scale in the threads that have the line's sums; b's, where there is one for 128 lines or for
//   all, is the tile's; where each line has its own, they are out's columns, and go through shared memory
//   (`by_column`): two rows of them in turn, so that one barrier a stage is enough.
//
//   `added`, what a weight's buffer holds of earlier gradients, joins the sums on their way out. Of few tiles, k is cut
//   into parts (gemm.cu).
//
//   flops   2 m n k, and 2 (by_column: 3) m n k / 128 beside the tensor cores
//   bytes   a stage: (128 + 64) 128 from the second-level cache, for 2 128 128 128 flops: 171 flops a byte
//   limit   the tensor cores: 8192 dense flops of 8 bits a clock and multiprocessor; at that rate the second-level
//           cache would have to give 48 bytes a clock to each
#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/fp8.h"
#include "cuda/gemm_host.h"
#include "cuda/gemm_result.cuh"
#include "cuda/gemm_sm90a_host.h"
#include "cuda/tensor_map.h"

namespace llmengine::cuda {

struct E4m3 {};
struct E5m2 {};  // of a alone
template <>
inline constexpr auto kMultiplicand<E4m3> = ptx::Multiplicand::e4m3;
template <>
inline constexpr auto kMultiplicand<E5m2> = ptx::Multiplicand::e5m2_e4m3;

namespace {

using namespace gemm_sm90a;

constexpr int kTileColumns = 128;
constexpr int kLeastPart = 2 * kLeastDepth;  // of k: products take half the time

struct ScaledShared : Shared<kTileColumns> {
  static_assert(kStages % 2 == 0, "from a round of stages to the next, two rows would not be in turn");
  float scales[kWarpgroups][2][kTileColumns];  // of b's lines, of two stages in turn
};

struct Scales {
  const float* data;
  int64_t of_k;     // from one stage's to the next one's; 0: one scale
  int lines, log2;  // of the matrix; of a block's lines

  __device__ __forceinline__ const float* of_line(int line) const {
    return data + ((line < lines ? line : lines - 1) >> log2);
  }
};

template <class T>
struct Scaled {
  Operands operands;
  Tiles tiles;
  Scales a, b;
  Result<T> to;
};

// The scales of the columns that this thread has sums of: one for all of them, or two in each eight.
template <bool by_column>
struct ColumnScales {
  float x[by_column ? kTileColumns / 8 : 1][2];

  __device__ __forceinline__ void load(const Scales& scales, int step, int column, float (&room)[kTileColumns]) {
    const int t = static_cast<int>(threadIdx.x) % 128, lane = t % 32;
    if constexpr (by_column) {
      room[t] = scales.of_line(column + t)[step * scales.of_k];
      ptx::barrier_sync(static_cast<int>(threadIdx.x) / 128, 128);
#pragma unroll
      for (int j = 0; j < kTileColumns / 8; ++j)
        x[j][0] = room[8 * j + lane % 4 * 2], x[j][1] = room[8 * j + lane % 4 * 2 + 1];
    } else {
      x[0][0] = x[0][1] = scales.of_line(column)[step * scales.of_k];
    }
  }
  __device__ __forceinline__ float operator()(int j, int i) const { return x[by_column ? j : 0][i]; }
};

template <class Format, bool by_column, class T>
__device__ __forceinline__ void multiply_scaled(ScaledShared& shared, const Scaled<T>& p) {
  const int group = static_cast<int>(threadIdx.x) / 128 - 1, block = ptx::block_in_cluster();
  const int line = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
  gemm_sm90a::Turn turn;
  for (int number = cluster_of_block(); number < p.tiles.count(); number += clusters()) {
    const Item item = p.tiles.item(number);
    const int row = (item.row * kCluster + block) * kRows + group * 64, column = item.column * kTileColumns;
    const float* of_rows[2] = {p.a.of_line(row + line), p.a.of_line(row + line + 8)};
    float sums[kTileColumns / 2] = {};
    for (int step = item.from; step < item.to; ++step, turn.next()) {
      const int s = turn.stage;
      float products[kTileColumns / 2];
      ptx::mbarrier_wait(&shared.full[s], turn.parity);
      ptx::wgmma_fence();
      multiply_stage<Format, false, false>(products, shared.a[s] + group * 64 * kDepth, shared.b[s], false);
      ptx::wgmma_commit();
      const float of_a[2] = {of_rows[0][step * p.a.of_k], of_rows[1][step * p.a.of_k]};
      ColumnScales<by_column> of_b;
      of_b.load(p.b, step, column, shared.scales[group][s % 2]);
      ptx::wgmma_wait<0>(products);
      gemm_sm90a::give_back(&shared.empty[s]);
#pragma unroll
      for (int j = 0; j < kTileColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[4 * j + i] += products[4 * j + i] * (of_a[i / 2] * of_b(j, i % 2));
    }
    const auto load = [&](int r, int v) { return p.to.load(row + r, column + v); };
    const auto store = [&](int r, int v, float (&x)[1][8], const typename Result<T>::Added& added) {
      p.to.store(row + r, column + v, item.part, x[0], added);
    };
    each_vector<1, kAddedAhead>(sums, shared.room(group), load, store, [](int) {});
  }
}

template <class T, class Format, bool by_column>
__global__ void __launch_bounds__(gemm_sm90a::kThreads, 1) fp8_product_sm90a(const __grid_constant__ Scaled<T> p) {
  auto& shared = *static_cast<ScaledShared*>(ptx::dynamic_shared_1024());
  share_work<kTileColumns>(
      shared, [&] { fetch_all<kTileColumns, false, false, false, kScaleDepth>(shared, p.operands, p.tiles); },
      [&] { multiply_scaled<Format, by_column>(shared, p); });
}

// ---- launches -------------------------------------------------------------------------------------------------------

// What the sums end in, as of a product of 16 bits.
Gemm ends_of(const Fp8Product& p, DType type) {
  Gemm ends{};
  ends.a = p.a, ends.a.dtype = type;
  ends.bias = p.bias, ends.added = p.added, ends.out = p.out, ends.room = p.room;
  return ends;
}

ptx::TensorMap map_of_bytes(const char* name, const TensorView& t, int lines) {
  return ptx::encode_tensor_map(tensor_map_fields(name, t, {lines, kScaleDepth}, Swizzle::bytes_128));
}

bool is_whole(const TensorView& scales) { return scales.size(0) == 1 && scales.size(1) == 1; }

// One for each line, where that is not the same as one for 128.
bool is_by_line(const TensorView& scales, int64_t lines) { return lines > 1 && scales.size(1) == lines; }

Scales scales_of(const TensorView& scales, int64_t lines) {
  const bool whole = is_whole(scales);
  return {scales.as<float>(), whole ? 0 : scales.size(1), static_cast<int>(lines),
          whole                       ? 31
          : is_by_line(scales, lines) ? 0
                                      : 7};
}

void check_operand(const Checker& at, const TensorView& t, const char* name, const TensorView& scales,
                   const char* scales_name) {
  at.defined(t, name);
  check_bytes(at, t, name);
  if (t.ndim != 2) at.fail_at(name, "must be (lines, k), got " + t.shape());
  const int64_t lines = t.size(0), k = t.size(1);
  if (k % 16 != 0) at.fail_at(name, "has " + std::to_string(k) + " of k; allowed: multiples of 16");
  if (t.numel() > 0) {
    if (const std::string reason = tensor_map_refuses(t); !reason.empty()) at.fail_at(name, "has " + reason);
  }
  at.defined(scales, scales_name);
  at.dtype(scales, scales_name, {DType::f32});
  at.contiguous(scales, scales_name);
  const int64_t deep = blocks_of(k, kScaleDepth), blocks = blocks_of(lines, 128);
  const bool fits =
      scales.ndim == 2 &&
      (is_whole(scales) || (scales.size(0) == deep && (scales.size(1) == lines || scales.size(1) == blocks)));
  if (!fits) {
    const auto shape = [&](int64_t each) { return "(" + std::to_string(deep) + ", " + std::to_string(each) + ")"; };
    at.fail_at(scales_name,
               "has shape " + scales.shape() + "; expected (1, 1), " + shape(lines) + " or " + shape(blocks));
  }
}

}  // namespace

void validate(const Fp8Product& p) {
  const Checker at{"fp8_product"};
  check_operand(at, p.a, "a", p.a_scales, "a_scales");
  check_operand(at, p.b, "b", p.b_scales, "b_scales");
  const int64_t m = p.a.size(0), n = p.b.size(0);
  at.shape(p.b, "b", {n, p.a.size(1)});
  if (p.a_format != "e4m3" && p.a_format != "e5m2") {
    at.fail_at("a_format", "is '" + p.a_format + "'; allowed: 'e4m3', 'e5m2'");
  }
  at.defined(p.out, "out");
  at.dtype(p.out, "out", kFloatTypes);
  at.shape(p.out, "out", {m, n});
  at.unit_last_stride(p.out, "out");
  at.dtype(p.bias, "bias", {p.out.dtype, DType::f32});
  at.shape(p.bias, "bias", {n});
  at.contiguous(p.bias, "bias");
  at.dtype(p.added, "added", {DType::f32});
  at.shape(p.added, "added", {m, n});
  at.unit_last_stride(p.added, "added");
  at.dtype(p.room, "room", {DType::f32});
  at.contiguous(p.room, "room");
}

void run(const Fp8Product& p, Stream stream) {
  const int64_t m = p.out.size(0), n = p.out.size(1), k = p.a.size(1);
  gemm::check_sizes("fp8_product", {m, n, k});
  check_is_hopper("fp8_product");
  if (p.out.numel() == 0) return;
  check(k > 0, "fp8_product: a and b have no k; allowed: 16 and more");
  Tiles tiles{ceil_divide(m, kRows * kCluster), ceil_divide(n, kTileColumns), ceil_divide(k, kScaleDepth),
              ceil_divide(k, kScaleDepth)};
  const Gemm ends = ends_of(p, p.out.dtype == DType::f16 ? DType::f16 : DType::bf16);
  tiles.parts = parts_of(ends, int64_t{tiles.rows} * tiles.columns, clusters_at_once(), kScaleDepth, kLeastPart);
  const auto a = map_of_bytes("a", p.a, kRows), b = map_of_bytes("b", p.b, kTileColumns / kCluster);
  const auto visit = [&]<class T, class Format, bool by_column>() {
    const Scaled<T> given{{{a, a}, {b, b}},
                          tiles,
                          scales_of(p.a_scales, m),
                          scales_of(p.b_scales, n),
                          tiles.parts > 1 ? parts_result_of<T>(ends) : result_of<T>(ends)};
    launch(site("fp8_product_sm90a", tiles, p.out, sizeof(ScaledShared), stream),
           fp8_product_sm90a<T, Format, by_column>, given);
  };
  gemm::visit_type(ends.a.dtype, [&]<class T>(T) {
    const bool by_column = is_by_line(p.b_scales, n), e5m2 = p.a_format == "e5m2";
    if (by_column) {
      e5m2 ? visit.template operator()<T, E5m2, true>() : visit.template operator()<T, E4m3, true>();
    } else {
      e5m2 ? visit.template operator()<T, E5m2, false>() : visit.template operator()<T, E4m3, false>();
    }
  });
  if (tiles.parts > 1) add_parts(ends, tiles.parts, stream);
}

}  // namespace llmengine::cuda
