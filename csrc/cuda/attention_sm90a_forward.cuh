// What Hopper's forward kernels share (attention_sm90a_forward.cu, attention_fp8_forward_sm90a.cu): a block's work, and
// the order in which its warpgroups take turns.
#pragma once

#include "cuda/attention_sm90a.cuh"
#include "cuda/ptx/barrier.cuh"

namespace llmengine::cuda::attention {

// A tile of rows from `first` on of a head of a sequence, and the keys [begin, end) that it goes through.
struct RowsWork {
  Sequence s;
  int head, first, begin, end;

  __device__ bool some() const { return begin < end; }
};

template <class S, class P>
__device__ __forceinline__ RowsWork work_of(const P& p, const Place& place) {
  const Sequence s = sequence_of(p.sizes, place.sequence);
  const int first = place.tile * S::rows;
  const Span span = seen_keys(p.seen, s, keys_of_rows(s.band(p.options), first, S::rows));
  return {s, place.head, first, begin_of_walk(span, S::keys), span.end};
}

// Whose turn it is, to begin products or to make exponentials: a warpgroup's after the one before it, the first one's
// after the last one.
template <class S>
struct Order {
  int group;

  static constexpr int kFirst = 1 + S::groups, kThreads = 256;  // ids of barriers; those who wait and who let go on

  __device__ __forceinline__ void begin() const {
    if (S::by_turns && group == S::groups - 1) ptx::barrier_arrive(kFirst, kThreads);
  }
  __device__ __forceinline__ void take() const {
    if constexpr (S::by_turns) ptx::barrier_sync(kFirst + group, kThreads);
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (S::by_turns) ptx::barrier_arrive(kFirst + (group + 1) % S::groups, kThreads);
  }
  __device__ __forceinline__ void end() const {
    if (S::by_turns && group == 0) ptx::barrier_sync(kFirst, kThreads);
  }
};

}  // namespace llmengine::cuda::attention
