// Sums over the rows of a matrix, for the gradients of biases: in float32 and in a fixed order.
//
//   A block has eight warps and 32 vectors of 16 bytes side by side; a warp adds every eighth row of the block's part,
//   and the first warp then the eight sums of a column. With more than one part, the sums of the parts are rows that
//   the same kernel adds up.
//
//   bytes   the matrix once
//   limit   memory bandwidth
#include <cstdint>

#include "cuda/dispatch.h"
#include "cuda/gemm.h"
#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

constexpr int kSumWarps = 8;

template <class S>
__global__ void __launch_bounds__(32 * kSumWarps)
    column_sums(const Rows<const S> rows, int64_t count, int columns, const Rows<float> sums) {
  constexpr int n = kLanes<S>;
  __shared__ float of_warps[kSumWarps][n][32];  // so that neither writes nor reads of a warp meet in a bank
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int column = static_cast<int>(blockIdx.x * 32 + threadIdx.x) * n;
  float total[n] = {};
  const int64_t step = static_cast<int64_t>(gridDim.y) * kSumWarps;
#pragma unroll 4
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kSumWarps + warp; row < count; row += step) {
    float x[n];
    unpack<S>(load_vector(rows[row], column, columns, rows.aligned), x);
#pragma unroll
    for (int i = 0; i < n; ++i) total[i] += x[i];
  }
#pragma unroll
  for (int i = 0; i < n; ++i) of_warps[warp][i][lane] = total[i];
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int w = 1; w < kSumWarps; ++w) total[i] += of_warps[w][i][lane];
  }
  store_floats(sums[blockIdx.y], column, columns, sums.aligned, total);
}

void add_up(const TensorView& rows, const TensorView& sums, unsigned parts, Stream stream) {
  const int columns = columns_of("column_sums", rows);
  const int width = 32 * static_cast<int>(16 / size_of(rows.dtype));
  const LaunchSite at{"column_sums", dim3(static_cast<unsigned>((columns + width - 1) / width), parts),
                      dim3(32, kSumWarps), cuda_stream(stream), rows};
  visit_float(rows.dtype, [&]<class S>(S) {
    launch(at, column_sums<S>, rows_of<const S>(rows), rows.size(0), columns, rows_of<float>(sums));
  });
}

}  // namespace

void validate(const ColumnSums& p) {
  const Checker at{"column_sums"};
  at.defined(p.rows, "rows");
  at.dtype(p.rows, "rows", kFloatTypes);
  if (p.rows.ndim != 2) at.fail_at("rows", "must be (rows, columns), got " + p.rows.shape());
  at.unit_last_stride(p.rows, "rows");
  at.dtype(p.partial, "partial", {DType::f32});
  at.contiguous(p.partial, "partial");
  if (p.partial.defined() && (p.partial.ndim != 2 || p.partial.size(0) < 1 || p.partial.size(0) > 65535 ||
                              p.partial.size(1) != p.rows.size(1))) {
    at.fail_at("partial", "must be (1 to 65535 parts, columns), got " + p.partial.shape());
  }
  at.defined(p.sums, "sums");
  at.dtype(p.sums, "sums", {DType::f32});
  at.shape(p.sums, "sums", {p.rows.size(1)});
  at.contiguous(p.sums, "sums");
}

void run(const ColumnSums& p, Stream stream) {
  if (!p.partial.defined()) return add_up(p.rows, p.sums, 1, stream);
  add_up(p.rows, p.partial, static_cast<unsigned>(p.partial.size(0)), stream);
  add_up(p.partial, p.sums, 1, stream);
}

}  // namespace llmengine::cuda
