// The kernels of cases.cu that copy asynchronously or multiply matrices.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"

namespace llmengine {
namespace {

// ---- asynchronous copies --------------------------------------------------------------------------------------------

// The first warp fetches 128 numbers, all turn them round. Broken: nobody waits for the copies.
template <bool broken>
__global__ void forgotten_wait(const float* in, float* out) {
  __shared__ float tile[128];
  if (threadIdx.x < 32) ptx::copy_async_16(tile + threadIdx.x * 4, in + threadIdx.x * 4);
  ptx::commit_copies();
  if constexpr (!broken) ptx::wait_copies<0>();
  __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

// Broken: copies that belong to no group, for which no wait waits.
template <bool broken>
__global__ void forgotten_commit(const float* in, float* out) {
  __shared__ float tile[128];
  ptx::copy_async_4(tile + threadIdx.x, in + threadIdx.x);
  if constexpr (!broken) ptx::commit_copies();
  ptx::wait_copies<0>();
  out[threadIdx.x] = tile[threadIdx.x];
}

// Broken: each thread waits for its own copies, and reads those of others.
template <bool broken>
__global__ void wait_without_barrier(const float* in, float* out) {
  __shared__ float tile[128];
  ptx::copy_async_4(tile + threadIdx.x, in + threadIdx.x);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  if constexpr (!broken) __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

enum class Mistake : uint8_t { none, group_too_many, stage_overwritten };

// Four rounds through two stages: while one is read, the next is fetched.
template <Mistake mistake>
__device__ void pipeline(const float* in, float* out) {
  __shared__ float stages[2][128];
  const auto fetch = [&](int round) {
    if (round < 4) ptx::copy_async_4(&stages[round % 2][threadIdx.x], in + round * 128 + threadIdx.x);
    ptx::commit_copies();
  };
  fetch(0);
  for (int round = 0; round < 4; ++round) {
    fetch(round + 1);
    ptx::wait_copies<mistake == Mistake::group_too_many ? 2 : 1>();
    __syncthreads();
    out[round * 128 + threadIdx.x] = stages[round % 2][127 - threadIdx.x];
    if constexpr (mistake != Mistake::stage_overwritten) __syncthreads();
  }
}
// Broken: the group that is read may be one of those that are still under way.
template <bool broken>
__global__ void group_too_many(const float* in, float* out) {
  pipeline<broken ? Mistake::group_too_many : Mistake::none>(in, out);
}
// Broken: a fast warp fetches into the stage that others still read.
template <bool broken>
__global__ void stage_overwritten(const float* in, float* out) {
  pipeline<broken ? Mistake::stage_overwritten : Mistake::none>(in, out);
}

// Broken: a copy's source changes while it may still be read.
template <bool broken>
__global__ void source_overwritten(const float* in, float* out) {
  __shared__ float tile[128];
  out[threadIdx.x] = in[threadIdx.x];
  ptx::copy_async_4(tile + threadIdx.x, out + threadIdx.x);
  ptx::commit_copies();
  if constexpr (!broken) ptx::wait_copies<0>();
  out[threadIdx.x] = 1.0f;
  if constexpr (broken) ptx::wait_copies<0>();
  out[threadIdx.x] += tile[threadIdx.x];
}

// Of 70 numbers the last fetch has two, and the others none: they read nothing, wherever they point. Broken: all read.
template <bool broken>
__global__ void fetch_past_the_end(const float* in, float* out, int n) {
  __shared__ float tile[128];
  const int first = static_cast<int>(threadIdx.x) * 4, valid = n - first;
  ptx::copy_async_16(tile + first, in + first, broken || valid >= 4 ? 16 : valid <= 0 ? 0 : valid * 4);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncwarp();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) out[i] = tile[i] + tile[127 - i];
}

// Broken: more bytes of the source than the copy has.
template <bool broken>
__global__ void fetch_of_too_many_bytes(const float* in, float* out) {
  __shared__ float tile[128];
  ptx::copy_async_8(tile + threadIdx.x * 2, in + threadIdx.x * 2, broken ? 16 : 8);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[threadIdx.x] = tile[threadIdx.x * 2 + 1];
}

// Broken: a copy of 16 bytes from, and one to, an address that is a multiple of 4 only.
template <bool broken>
__global__ void misaligned_source(const float* in, float* out) {
  __shared__ float tile[128];
  ptx::copy_async_16(tile + threadIdx.x * 4, in + threadIdx.x * 4 + broken);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[threadIdx.x] = tile[threadIdx.x * 4];
}
template <bool broken>
__global__ void misaligned_destination(const float* in, float* out) {
  __shared__ float tile[132];
  ptx::copy_async_16(tile + threadIdx.x * 4 + broken, in + threadIdx.x * 4);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[threadIdx.x] = tile[threadIdx.x * 4 + broken];
}

// Broken: the destination is not shared memory.
template <bool broken>
__global__ void fetch_to_global_memory(const float* in, float* out) {
  __shared__ float tile[128];
  ptx::copy_async_4(broken ? out + threadIdx.x : tile + threadIdx.x, in + threadIdx.x);
}

// Copies that nobody waits for, by every block: no mistake.
__global__ void copies_left_behind(const float* in, float* out) {
  __shared__ float tile[128];
  out[blockIdx.x * 128 + threadIdx.x] = in[threadIdx.x];
  ptx::copy_async_4(tile + threadIdx.x, in + blockIdx.x * 128 + threadIdx.x);
}

[[gnu::noinline, gnu::no_sanitize("thread")]] bool has_arrived(const float* element) { return *element >= 0.0f; }

// Counts, behind the simulator's back, the copies that have arrived at once, and those of a later group than the one
// that was waited for.
__global__ void arrivals_at_once(const float* in, float* out) {
  __shared__ float tile[128];
  ptx::copy_async_4(tile + threadIdx.x, in + threadIdx.x);
  out[threadIdx.x] = (has_arrived(tile + threadIdx.x) ? 1.0f : 0.0f) / static_cast<float>(threadIdx.x + 1);
}
__global__ void early_arrivals(const float* in, float* out) {
  __shared__ float tiles[2][128];
  for (auto& tile : tiles) {
    ptx::copy_async_4(tile + threadIdx.x, in + threadIdx.x);
    ptx::commit_copies();
  }
  __syncthreads();
  ptx::wait_copies<1>();
  const bool early = has_arrived(tiles[1] + threadIdx.x);
  out[threadIdx.x] = (early ? 1.0f : 0.0f) / static_cast<float>(threadIdx.x + 1) + 0.0f * tiles[0][threadIdx.x];
}

// ---- matrices -------------------------------------------------------------------------------------------------------

// Each lane writes a row, and all are loaded. Broken: a warp is thought to run in step.
template <bool broken>
__global__ void rows_of_a_warp(const float* in, float* out) {
  __shared__ float4 rows[32];
  rows[threadIdx.x] = make_float4(in[threadIdx.x], 1.0f, 2.0f, 3.0f);
  if constexpr (!broken) __syncwarp();
  uint32_t r[4];
  ptx::load_matrix_x4(r, rows + threadIdx.x);
  out[threadIdx.x] = __uint_as_float(r[0]) + __uint_as_float(r[3]);
}

// Broken: rows that are 24 bytes apart.
template <bool broken>
__global__ void misaligned_row(const float* in, float* out) {
  __shared__ float tile[256];
  for (unsigned i = threadIdx.x; i < 256; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t r[2];
  ptx::load_matrix_x2(r, tile + threadIdx.x % 16 * (broken ? 6 : 8));
  out[threadIdx.x] = __uint_as_float(r[0]) + __uint_as_float(r[1]);
}

// Broken: the last rows lie past the array.
template <bool broken>
__global__ void row_past_the_array(const float* in, float* out) {
  __shared__ float tile[128];
  for (unsigned i = threadIdx.x; i < 128; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  ptx::load_matrix_x4(r, tile + threadIdx.x * 4 + (broken && threadIdx.x >= 28 ? 16 : 0));
  out[threadIdx.x] = __uint_as_float(r[0]) + __uint_as_float(r[3]);
}

// Broken: four rows were never filled.
template <bool broken>
__global__ void unwritten_row(const float* in, float* out) {
  __shared__ float4 rows[32];
  if (threadIdx.x < (broken ? 28 : 32)) rows[threadIdx.x] = make_float4(in[threadIdx.x], 1.0f, 2.0f, 3.0f);
  __syncwarp();
  uint32_t r[4];
  ptx::load_matrix_x4_transposed(r, rows + threadIdx.x);
  out[threadIdx.x] = static_cast<float>(r[3] & 0xff);
}

// Broken: what a warp has stored is read by other lanes at once.
template <bool broken>
__global__ void stored_rows(const float* in, float* out) {
  __shared__ float4 rows[16];
  const uint32_t r[2] = {__float_as_uint(in[threadIdx.x]), __float_as_uint(in[threadIdx.x + 32])};
  ptx::store_matrix_x2(rows + threadIdx.x % 16, r);
  if constexpr (!broken) __syncwarp();
  const auto* numbers = reinterpret_cast<const float*>(rows);
  out[threadIdx.x] = numbers[63 - threadIdx.x] + numbers[threadIdx.x];
}

__device__ uint32_t pair_of_ones() { return 0x3f803f80; }

// Broken: the last lane does not come.
template <bool broken>
__global__ void lane_missing_from_a_product(const float* in, float* out) {
  float d[4] = {in[threadIdx.x], 0.0f, 0.0f, 0.0f};
  const uint32_t one = pair_of_ones(), a[4] = {one, one, one, one}, b[2] = {one, one};
  if (!broken || threadIdx.x != 31) ptx::mma_16x8x16_bf16(d, a, b);
  out[threadIdx.x] = d[0];
}

// Broken: half a warp multiplies here, half there.
template <bool broken>
__global__ void product_in_branches(const float* in, float* out) {
  float d[4] = {in[threadIdx.x], 0.0f, 0.0f, 0.0f};
  const uint32_t one = pair_of_ones(), a[4] = {one, one, one, one}, b[2] = {one, one};
  if (broken && threadIdx.x < 16) {
    ptx::mma_16x8x16_bf16(d, a, b);
  } else {
    ptx::mma_16x8x16_bf16(d, a, b);
  }
  out[threadIdx.x] = d[0];
}

// Broken: the launch has half a warp.
template <bool broken>
__global__ void product_of_half_a_warp(const float* in, float* out) {
  float d[4] = {in[threadIdx.x], 0.0f, 0.0f, 0.0f};
  const uint32_t a[2] = {pair_of_ones(), pair_of_ones()}, b[1] = {pair_of_ones()};
  ptx::mma_16x8x8_bf16(d, a, b);
  out[threadIdx.x] = d[0];
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

enum class Bulk : uint8_t { none, no_wait, one_look, parity, expectation, few_bytes, arrivals, fence, sync, slots };

// One thread fetches four tiles through two slots, all turn them round; a slot is fetched into again when all have
// arrived at its `empty`. Broken in as many ways as there are names above.
template <Bulk mistake>
__device__ void bulk_tiles(const float* in, float* out) {
  constexpr int kBytes = 128 * sizeof(float);
  __shared__ float4 slots[2][32];
  __shared__ ptx::Mbarrier full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(&full[s], mistake == Bulk::arrivals ? 2 : 1);
      ptx::mbarrier_init(&empty[s], 128);
    }
    if constexpr (mistake != Bulk::fence) ptx::mbarrier_init_fence();
  }
  if constexpr (mistake != Bulk::sync) __syncthreads();
  const auto fetch = [&](int round) {
    const int s = round % 2;
    if constexpr (mistake != Bulk::slots) ptx::mbarrier_wait(&empty[s], (round / 2 + 1) % 2);
    if constexpr (mistake == Bulk::expectation) {
      ptx::mbarrier_arrive(&full[s]);
    } else {
      ptx::mbarrier_arrive_expect_tx(&full[s], mistake == Bulk::few_bytes ? kBytes / 2 : kBytes);
    }
    for (int half = 0; half < 2; ++half) {
      ptx::copy_bulk(&slots[s][half * 16], in + round * 128 + half * 64, kBytes / 2, &full[s]);
    }
  };
  if (threadIdx.x == 0) fetch(0);
  for (int round = 0; round < 4; ++round) {
    const int s = round % 2, parity = round / 2 % 2;
    if (threadIdx.x == 0 && round < 3) fetch(round + 1);
    if constexpr (mistake == Bulk::no_wait) {
      __syncthreads();
    } else if constexpr (mistake == Bulk::one_look) {
      ptx::mbarrier_try_wait(&full[s], parity);
    } else {
      ptx::mbarrier_wait(&full[s], mistake == Bulk::parity ? 1 - parity : parity);
    }
    out[round * 128 + threadIdx.x] = reinterpret_cast<const float*>(slots[s])[127 - threadIdx.x];
    ptx::mbarrier_arrive(&empty[s]);
  }
}
template <bool broken, Bulk mistake>
__global__ void bulk(const float* in, float* out) {
  bulk_tiles<broken ? mistake : Bulk::none>(in, out);
}

// The first warp's lanes fetch and arrive, the second warp's wait and read. Broken: who arrives has not waited for its
// copy.
template <bool broken>
__global__ void copies_behind_an_mbarrier(const float* in, float* out) {
  __shared__ float tile[32];
  __shared__ ptx::Mbarrier full;
  if (threadIdx.x == 0) ptx::mbarrier_init(&full, 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    ptx::copy_async_4(tile + threadIdx.x, in + threadIdx.x);
    ptx::commit_copies();
    if constexpr (!broken) ptx::wait_copies<0>();
    ptx::mbarrier_arrive(&full);
  } else {
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = tile[63 - threadIdx.x];
  }
}

// Broken: two copies come where one is expected.
template <bool broken>
__global__ void one_copy_expected(const float* in, float* out) {
  __shared__ float4 tile[32];
  __shared__ ptx::Mbarrier full;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect_tx(&full, broken ? 256 : 512);
    for (int half = 0; half < 2; ++half) ptx::copy_bulk(tile + half * 16, in + half * 64, 256, &full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&full, 0);
  out[threadIdx.x] = tile[threadIdx.x].y;
}

// Broken: a size that is no multiple of 16.
template <bool broken>
__global__ void bulk_copy_of_odd_size(const float* in, float* out) {
  __shared__ float4 tile[32];
  __shared__ ptx::Mbarrier full;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect_tx(&full, broken ? 500 : 512);
    ptx::copy_bulk(tile, in, broken ? 500 : 512, &full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&full, 0);
  out[threadIdx.x] = tile[threadIdx.x].y;
}

// Each thread copies in bulk, and counts its copy if that has come at the first look.
__global__ void one_look_each(const float* in, float* out) {
  __shared__ float4 tile[32];
  __shared__ ptx::Mbarrier full[32];
  ptx::Mbarrier* const own = &full[threadIdx.x];
  ptx::mbarrier_init(own, 1);
  ptx::mbarrier_init_fence();
  ptx::mbarrier_arrive_expect_tx(own, 16);
  ptx::copy_bulk(tile + threadIdx.x, in + 4 * threadIdx.x, 16, own);
  const bool came = ptx::mbarrier_try_wait(own, 0);
  ptx::mbarrier_wait(own, 0);
  out[threadIdx.x] = (came ? 1.0f : 0.0f) / static_cast<float>(threadIdx.x + 1);
}

}  // namespace
}  // namespace llmengine
