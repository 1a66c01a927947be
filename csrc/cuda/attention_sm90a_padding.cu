// Padding on Hopper: of a boolean mask that all rows and heads of a sequence share, from where to where it shows keys.
//
//   Kernels then go through those alone, and look at the mask of what they go through by bits: a key's is one lane's to
//   read. Logits stay what they are without a mask.
//
//   bytes   1 a key
//   limit   latency: some microseconds
#include <cstdint>

#include "cuda/attention_sm90a.cuh"
#include "cuda/launch.cuh"

namespace llmengine::cuda::attention {
namespace {

inline constexpr int kSeenThreads = 256;

// A block for every line of the mask; of one without keys, [0, 0).
__global__ void __launch_bounds__(kSeenThreads)
    attention_seen_sm90a(const uint8_t* mask, int64_t stride, int keys, int32_t* spans) {
  __shared__ int of_warps[kSeenThreads / 32][2];
  const uint8_t* line = mask + blockIdx.x * stride;
  int behind = 0, last = 0;  // keys from the first one on, and before the end
#pragma unroll 4
  for (int key = static_cast<int>(threadIdx.x); key < keys; key += kSeenThreads)
    if (line[key]) behind = largest(behind, keys - key), last = key + 1;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    behind = largest(behind, __shfl_xor_sync(kWholeWarp, behind, lanes));
    last = largest(last, __shfl_xor_sync(kWholeWarp, last, lanes));
  }
  if (lane_of() == 0) of_warps[warp_of()][0] = behind, of_warps[warp_of()][1] = last;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const auto& of_warp : of_warps) behind = largest(behind, of_warp[0]), last = largest(last, of_warp[1]);
  spans[2 * blockIdx.x] = last > 0 ? keys - behind : 0;
  spans[2 * blockIdx.x + 1] = last;
}

}  // namespace

void run_seen(const ops::AttentionOptions& p, const TensorView& spans, Stream stream) {
  if (!is_padding(p)) return;
  const Seen seen = seen_of(p, spans);
  launch({"attention_seen_sm90a", grid_of_tiles(p.mask.size(0)), kSeenThreads, cuda_stream(stream), p.mask},
         attention_seen_sm90a, seen.keys, seen.batch, static_cast<int>(p.key.size(2)), spans.as<int32_t>());
}

void check_spans(const Checker& at, const ops::AttentionOptions& p, const TensorView& spans) {
  if (!is_padding(p)) return;
  at.defined(spans, "spans");
  at.dtype(spans, "spans", {DType::i32});
  at.shape(spans, "spans", {p.mask.size(0), 2});
  at.contiguous(spans, "spans");
}

}  // namespace llmengine::cuda::attention
