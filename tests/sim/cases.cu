// Small kernels, each in two versions: `broken` has one mistake that CUDA code is known for, and the other has not.
// case_runs.h runs them, tests/sim/test_simulator.py says what the simulator must find.
#include <cuda_runtime.h>

#include <map>
#include <string>

#include "case_runs.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/reduce.cuh"
#include "tensor_cases.cuh"

namespace llmengine {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- barriers -------------------------------------------------------------------------------------------------------

// Turns 128 numbers round. Broken: nobody waits for the others' writes.
template <bool broken>
__global__ void reverse_in_shared(const float* in, float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = in[threadIdx.x];
  if constexpr (!broken) __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

// Sums of four rounds through the same slots. Broken: a fast warp begins the next round while others still read.
template <bool broken>
__global__ void reuse_of_slots(const float* in, float* out) {
  __shared__ float slots[4];
  for (int round = 0; round < 4; ++round) {
    float x[1] = {in[round * 128 + threadIdx.x]};
    cuda::warp_reduce<cuda::Sum>(x);
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x[0];
    __syncthreads();
    out[round * 128 + threadIdx.x] = slots[0] + slots[1] + slots[2] + slots[3];
    if constexpr (!broken) __syncthreads();
  }
}

// Broken: only the first warp comes to the barrier.
template <bool broken>
__global__ void barrier_of_some(const float* in, float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = in[threadIdx.x];
  if (!broken || threadIdx.x < 32) {
    __syncthreads();
  }
  out[threadIdx.x] = tile[threadIdx.x];
}

// Broken: the two halves of the block meet at two different barriers.
template <bool broken>
__global__ void barrier_in_branches(const float* in, float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = in[threadIdx.x];
  if (broken && threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

// Warps 0 and 1 hand tiles to warps 2 and 3. Broken: the barrier waits for one warp more than comes.
template <bool broken>
__global__ void named_barriers(const float* in, float* out) {
  __shared__ float tile[64];
  if (threadIdx.x < 64) {
    tile[threadIdx.x] = in[threadIdx.x];
    ptx::barrier_arrive(1, broken ? 160 : 128);
  } else {
    ptx::barrier_sync(1, broken ? 160 : 128);
    out[threadIdx.x - 64] = tile[127 - threadIdx.x];
  }
}

// The same of two tiles; the first warp is done with both before the second begins. Broken: with one barrier, at which
// it arrives again before the second has come once.
template <bool broken>
__global__ void barriers_in_turn(const float* in, float* out) {
  __shared__ float tiles[2][64];
  if (threadIdx.x / 32 == 1) ptx::barrier_sync(3, 64);
  for (int tile = 0; tile < 2; ++tile) {
    const int id = broken ? 1 : 1 + tile;
    if (threadIdx.x < 64) {
      tiles[tile][threadIdx.x] = in[tile * 64 + threadIdx.x];
      ptx::barrier_arrive(id, 128);
    } else {
      ptx::barrier_sync(id, 128);
      out[tile * 64 + threadIdx.x - 64] = tiles[tile][127 - threadIdx.x];
    }
  }
  if (threadIdx.x / 32 == 0) ptx::barrier_arrive(3, 64);
}

// Half a block hands a tile to the other. Broken: the halves are the even and the odd lanes of each warp.
template <bool broken>
__global__ void half_a_warp(const float* in, float* out) {
  __shared__ float tile[64];
  const unsigned place = broken ? threadIdx.x / 2 : threadIdx.x % 64;
  if (broken ? threadIdx.x % 2 == 0 : threadIdx.x < 64) {
    tile[place] = in[threadIdx.x];
    ptx::barrier_arrive(1, 128);
  } else {
    ptx::barrier_sync(1, 128);
    out[place] = tile[63 - place];
  }
}

// Broken: a barrier that there is not, a count that is not of whole warps, a warp that counts otherwise.
template <bool broken>
__global__ void barrier_beyond(const float* in, float* out) {
  ptx::barrier_sync(broken ? 16 : 15, 128);
  out[threadIdx.x] = in[threadIdx.x];
}
template <bool broken>
__global__ void barrier_of_a_hundred(const float* in, float* out) {
  ptx::barrier_sync(1, broken ? 100 : 128);
  out[threadIdx.x] = in[threadIdx.x];
}
template <bool broken>
__global__ void barrier_of_two_counts(const float* in, float* out) {
  ptx::barrier_sync(1, broken && threadIdx.x < 32 ? 64 : 128);
  out[threadIdx.x] = in[threadIdx.x];
}

// ---- warps ----------------------------------------------------------------------------------------------------------

// Lanes trade numbers through shared memory. Broken: a warp is thought to run in step.
template <bool broken>
__global__ void neighbours_in_a_warp(const float* in, float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = in[threadIdx.x];
  if constexpr (!broken) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Broken: half a warp reads the lanes that take no part.
template <bool broken>
__global__ void shuffle_of_half(const float* in, float* out) {
  const float x = in[threadIdx.x];
  float y = 0.0f;
  if (threadIdx.x < 16) y = __shfl_xor_sync(0xffffu, x, broken ? 16 : 8);
  out[threadIdx.x] = y;
}

// Broken: the mask names lanes that went another way.
template <bool broken>
__global__ void mask_of_absent_lanes(const float* in, float* out) {
  float x = in[threadIdx.x];
  if (threadIdx.x < 16) {
    x += __shfl_xor_sync(broken ? kAll : 0xffffu, x, 1);
  } else {
    __syncwarp(0xffff0000u);
    x += __shfl_xor_sync(0xffff0000u, x, 1);
  }
  out[threadIdx.x] = x;
}

// Broken: a lane calls with a mask that leaves it out.
template <bool broken>
__global__ void mask_without_oneself(const float* in, float* out) {
  out[threadIdx.x] = __ballot_sync(broken ? kAll - 1 : kAll, in[threadIdx.x] >= 0.0f) != 0;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// Broken: <= where < is meant.
template <bool broken>
__global__ void past_the_end(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (broken ? i <= n : i < n) out[i] = in[i];
}

// Broken: writes one column more than the row has, into the padding before the next.
template <bool broken>
__global__ void past_the_row(float* out, int columns, int stride) {
  const int c = static_cast<int>(threadIdx.x);
  if (c < columns + broken) out[blockIdx.x * stride + c] = 1.0f;
}

// Broken: the shared array has no room for the halo.
template <bool broken>
__global__ void halo(const float* in, float* out) {
  __shared__ float tile[broken ? 64 : 65];
  tile[threadIdx.x + 1] = in[threadIdx.x];
  if (threadIdx.x == 0) tile[0] = 0.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x] + tile[threadIdx.x + 1];
}

// Broken: the launch asks for one number too few.
template <bool broken>
__global__ void dynamic_memory(const float* in, float* out) {
  auto* tile = static_cast<float*>(ptx::dynamic_shared());
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

// Broken: so far past the end of dynamic memory that the simulator keeps other things there, of `bytes`.
template <bool broken>
__global__ void far_past_dynamic_memory(const float* in, float* out, int bytes) {
  __shared__ float any[4];
  if (threadIdx.x < 4) any[threadIdx.x] = in[threadIdx.x];
  auto* tile = static_cast<float*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) tile[broken ? bytes / 4 : 0] = 5.0f;
  __syncthreads();
  out[threadIdx.x] = 1.0f + any[0];
}
__global__ void distance_of_blocks(float* out) {
  void* const own = ptx::dynamic_shared();
  if (ptx::block_in_cluster() == 0 && threadIdx.x == 0) {
    out[0] = static_cast<float>(ptx::map_to_block(own, 1).address - reinterpret_cast<uintptr_t>(own));
  }
}

// Broken: one past the end of an array of whole pages, which another may follow.
template <bool broken>
__global__ void overrun_of_whole_pages(const float* in, float* out) {
  __shared__ float first[1024], second[1024];
  first[threadIdx.x] = second[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x == 0) first[broken ? 1024 : 0] = 7.0f;
  __syncthreads();
  out[threadIdx.x] = first[threadIdx.x] + second[127 - threadIdx.x];
}

// Broken: it is launched with as much dynamic memory as a block may have, and has a variable besides.
template <bool broken>
__global__ void more_than_there_is(const float* in, float* out) {
  __shared__ float tile[12000];
  for (unsigned i = threadIdx.x; i < 12000; i += 128) tile[i] = in[i % 128];
  __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

// Broken: a slot that nobody filled is added up.
template <bool broken>
__global__ void unwritten_slot(const float* in, float* out) {
  __shared__ float slots[4];
  if (threadIdx.x < (broken ? 3 : 4)) slots[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = slots[0] + slots[1] + slots[2] + slots[3];
}

// Broken: the last number of every vector was never filled.
template <bool broken>
__global__ void partly_written_vector(const float* in, float* out) {
  __shared__ float4 vectors[32];
  auto* numbers = reinterpret_cast<float*>(vectors + threadIdx.x);
  for (int i = 0; i < (broken ? 3 : 4); ++i) numbers[i] = in[threadIdx.x + i];
  const float4 vector = vectors[threadIdx.x];
  out[threadIdx.x] = vector.x + vector.w;
}

// Broken: a vector load from an address that is a multiple of 4 only.
template <bool broken>
__global__ void misaligned_vector(const float* in, float* out) {
  const uint4 word = ptx::load_16(in + threadIdx.x * 4 + broken);
  ptx::store_16(out + threadIdx.x * 4, word);
}

// Counts threads. Broken: without an atomic.
template <bool broken>
__global__ void count_threads(float* out) {
  if constexpr (broken) {
    out[0] = out[0] + 1.0f;
  } else {
    atomicAdd(out, 1.0f);
  }
}

// Broken: every block writes the same element.
template <bool broken>
__global__ void one_element_of_all_blocks(float* out) {
  if (threadIdx.x == 0) out[broken ? 0 : blockIdx.x] = 1.0f;
}

// ---- a file of csrc/cuda/ -------------------------------------------------------------------------------------------

// The reduction of csrc/cuda/reduce.cuh, round after round: test_simulator.py breaks that file itself.
__global__ void row_sums(const float* in, float* out) {
  __shared__ cuda::RowSlots<1, 4> slots;
  int turn = 0;
  for (int round = 0; round < 4; ++round) {
    float x[1] = {in[round * 128 + threadIdx.x]};
    cuda::row_reduce<cuda::Sum>(x, slots, turn);
    out[round * 128 + threadIdx.x] = x[0];
  }
}

// ---- schedules ------------------------------------------------------------------------------------------------------

// In which order threads come: the ticket of each; how often those of two successive tickets are of different warps.
__global__ void tickets(const float*, float* out) { out[1 + threadIdx.x] = atomicAdd(out, 1.0f); }
__global__ void changes_of_warps(const float*, float* out) {
  __shared__ int next, changes;
  __shared__ unsigned comers[128];
  if (threadIdx.x == 0) next = changes = 0;
  __syncthreads();
  comers[atomicAdd(&next, 1)] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x < 127 && comers[threadIdx.x] / 32 != comers[threadIdx.x + 1] / 32) atomicAdd(&changes, 1);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = static_cast<float>(changes);
}

// A thread of the first warp follows the rounds of the others by the parity of their mbarrier. Broken: no round waits
// for it, so that two may pass by while it looks away; then the parity is what it was, and it waits for ever.
template <bool broken>
__global__ void watcher_of_rounds(const float*, float* out) {
  __shared__ ptx::Mbarrier round_over;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&round_over, broken ? 96 : 97);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  const bool watches = threadIdx.x == 31, takes_part = threadIdx.x >= 32 || (!broken && watches);
  for (int round = 0; round < 2; ++round) {
    if (takes_part) ptx::mbarrier_arrive(&round_over);
    if (takes_part || watches) ptx::mbarrier_wait(&round_over, round);
  }
  out[threadIdx.x] = 1.0f;
}

// ---- runs -----------------------------------------------------------------------------------------------------------

template <bool broken>
std::map<std::string, Case> all_cases() {
  const auto plain = [](auto kernel, unsigned threads, size_t shared = 0) {
    return Case{[=](const float* in, float* out) { launch(kernel, 1, threads, shared, in, out); }};
  };
  return {
      {"reverse_in_shared", plain(reverse_in_shared<broken>, 128)},
      {"reuse_of_slots", plain(reuse_of_slots<broken>, 128)},
      {"barrier_of_some", plain(barrier_of_some<broken>, 128)},
      {"barrier_in_branches", plain(barrier_in_branches<broken>, 128)},
      {"named_barriers", plain(named_barriers<broken>, 128)},
      {"barriers_in_turn", plain(barriers_in_turn<broken>, 128)},
      {"half_a_warp", plain(half_a_warp<broken>, 128)},
      {"barrier_beyond", plain(barrier_beyond<broken>, 128)},
      {"barrier_of_a_hundred", plain(barrier_of_a_hundred<broken>, 128)},
      {"barrier_of_two_counts", plain(barrier_of_two_counts<broken>, 128)},
      {"neighbours_in_a_warp", plain(neighbours_in_a_warp<broken>, 32)},
      {"shuffle_of_half", plain(shuffle_of_half<broken>, 32)},
      {"mask_of_absent_lanes", plain(mask_of_absent_lanes<broken>, 32)},
      {"mask_without_oneself", plain(mask_without_oneself<broken>, 32)},
      {"past_the_end",
       {[](const float* in, float* out) { launch(past_the_end<broken>, 3, 32, 0, in, out, 70); },
        view(nullptr, 1, 70, 70)}},
      {"past_the_row",
       {[](const float*, float* out) { launch(past_the_row<broken>, 3, 32, 0, out, 20, 24); },
        view(nullptr, 3, 20, 24)}},
      {"halo", plain(halo<broken>, 64)},
      {"dynamic_memory", plain(dynamic_memory<broken>, 64, (broken ? 63 : 64) * sizeof(float))},
      {"among_variables", {[](const float* in, float* out) {
         launch(far_past_dynamic_memory<broken>, 1, 128, 1024, in, out, 228 << 10);
       }}},
      {"memory_of_no_block", {[](const float* in, float* out) {
         launch_cluster(distance_of_blocks, 2, 32, 2, 1024, out);
         launch(far_past_dynamic_memory<broken>, 1, 128, 1024, in, out, static_cast<int>(out[0]));
       }}},
      {"overrun_of_whole_pages", plain(overrun_of_whole_pages<broken>, 128)},
      {"more_than_there_is", plain(more_than_there_is<broken>, 128, broken ? 227 << 10 : 1024)},
      {"unwritten_slot", plain(unwritten_slot<broken>, 32)},
      {"partly_written_vector", plain(partly_written_vector<broken>, 32)},
      {"misaligned_vector", plain(misaligned_vector<broken>, 32)},
      {"count_threads", {[](const float*, float* out) { launch(count_threads<broken>, 1, 64, 0, out); }}},
      {"watcher_of_rounds", plain(watcher_of_rounds<broken>, 128)},
      {"one_element_of_all_blocks",
       {[](const float*, float* out) { launch(one_element_of_all_blocks<broken>, 4, 32, 0, out); }}},
      {"forgotten_wait", plain(forgotten_wait<broken>, 128)},
      {"forgotten_commit", plain(forgotten_commit<broken>, 128)},
      {"wait_without_barrier", plain(wait_without_barrier<broken>, 128)},
      {"group_too_many", plain(group_too_many<broken>, 128)},
      {"stage_overwritten", plain(stage_overwritten<broken>, 128)},
      {"source_overwritten", plain(source_overwritten<broken>, 128)},
      {"fetch_past_the_end",
       {[](const float* in, float* out) { launch(fetch_past_the_end<broken>, 1, 32, 0, in, out, 70); },
        view(nullptr, 1, 70, 70)}},
      {"fetch_of_too_many_bytes", plain(fetch_of_too_many_bytes<broken>, 32)},
      {"misaligned_source", plain(misaligned_source<broken>, 32)},
      {"misaligned_destination", plain(misaligned_destination<broken>, 32)},
      {"fetch_to_global_memory", plain(fetch_to_global_memory<broken>, 32)},
      {"copies_left_behind", {[](const float* in, float* out) { launch(copies_left_behind, 4, 128, 0, in, out); }}},
      {"arrivals_at_once", plain(arrivals_at_once, 128)},
      {"early_arrivals", plain(early_arrivals, 128)},
      {"rows_of_a_warp", plain(rows_of_a_warp<broken>, 32)},
      {"misaligned_row", plain(misaligned_row<broken>, 32)},
      {"row_past_the_array", plain(row_past_the_array<broken>, 32)},
      {"unwritten_row", plain(unwritten_row<broken>, 32)},
      {"stored_rows", plain(stored_rows<broken>, 32)},
      {"lane_missing_from_a_product", plain(lane_missing_from_a_product<broken>, 32)},
      {"product_in_branches", plain(product_in_branches<broken>, 32)},
      {"product_of_half_a_warp", plain(product_of_half_a_warp<broken>, broken ? 16 : 32)},
      {"bulk_no_wait", plain(bulk<broken, Bulk::no_wait>, 128)},
      {"bulk_one_look", plain(bulk<broken, Bulk::one_look>, 128)},
      {"bulk_parity", plain(bulk<broken, Bulk::parity>, 128)},
      {"bulk_expectation", plain(bulk<broken, Bulk::expectation>, 128)},
      {"bulk_few_bytes", plain(bulk<broken, Bulk::few_bytes>, 128)},
      {"bulk_arrivals", plain(bulk<broken, Bulk::arrivals>, 128)},
      {"bulk_fence", plain(bulk<broken, Bulk::fence>, 128)},
      {"bulk_sync", plain(bulk<broken, Bulk::sync>, 128)},
      {"bulk_slots", plain(bulk<broken, Bulk::slots>, 128)},
      {"copies_behind_an_mbarrier", plain(copies_behind_an_mbarrier<broken>, 64)},
      {"one_copy_expected", plain(one_copy_expected<broken>, 32)},
      {"bulk_copy_of_odd_size", plain(bulk_copy_of_odd_size<broken>, 32)},
      {"row_sums", plain(row_sums, 128)},
      {"tickets", plain(tickets, 128)},
      {"changes_of_warps", plain(changes_of_warps, 128)},
      {"one_look_each", plain(one_look_each, 32)},
  };
}

}  // namespace
}  // namespace llmengine

int main(int count, char** arguments) {
  return llmengine::run_cases(count, arguments, llmengine::all_cases<true>(), llmengine::all_cases<false>());
}
