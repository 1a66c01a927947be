// The kernels of hopper_cases.cu that multiply by warpgroups.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "hopper_shared.cuh"

namespace llmengine {
namespace {

using ptx::Multiplicand;

enum class Product : uint8_t {
  none,
  no_wait,
  wait_one,
  no_fence,
  touched,
  no_fence_async,
  copies_unfenced,
  overwritten,
  registers,
  branches,
  warp,
  descriptors,
  outside,
  pattern
};

// 64 x 16 by 16 x 16, bf16, twice, a in shared memory and in registers; k-major, without a swizzle.
template <bool broken, Product name>
__global__ void products(const float* in, float* out) {
  constexpr Product mistake = broken ? name : Product::none;
  auto* tiles = static_cast<float*>(ptx::dynamic_shared_1024());
  for (int i = thread(); i < 512; i += 128) tiles[i] = in[i];
  if (thread() < 32) ptx::copy_async_16(tiles + 512 + 4 * thread(), in + 4 * thread());
  ptx::commit_copies();
  if constexpr (mistake == Product::copies_unfenced) ptx::fence_async_shared();
  ptx::wait_copies<0>();
  if constexpr (mistake != Product::no_fence_async && mistake != Product::copies_unfenced) ptx::fence_async_shared();
  __syncthreads();
  const bool other = mistake == Product::descriptors && thread() >= 64;
  const auto a = ptx::matrix_descriptor(tiles + (other ? 4 : 0), 1024, 128, Swizzle::none);
  const auto b = ptx::matrix_descriptor(tiles + 512, mistake == Product::outside ? 1 << 17 : 256, 128, Swizzle::none);
  // One row of a swizzle's pattern too far.
  const auto rows =
      ptx::matrix_descriptor(tiles + (mistake == Product::pattern ? 544 : 512), 16, 256, Swizzle::bytes_32);
  float d[8] = {}, e[8] = {};
  uint32_t fragment[4] = {0x3f803f80, 0x3f803f80, 0x40004000, 0x3f803f80};
  if constexpr (mistake != Product::no_fence) ptx::wgmma_fence(d);
  if constexpr (mistake == Product::touched) d[3] += in[0];
  if (mistake != Product::warp || thread() < 96) {
    if (mistake == Product::branches && thread() < 64) {
      ptx::wgmma<Multiplicand::bf16>(d, a, b, true);
    } else {
      ptx::wgmma<Multiplicand::bf16>(d, a, b, true);
    }
  }
  ptx::wgmma_commit();
  if constexpr (mistake == Product::overwritten) tiles[thread()] = 0.0f;
  ptx::wgmma<Multiplicand::bf16>(e, fragment, rows, false);
  ptx::wgmma_commit();
  if constexpr (mistake == Product::registers) fragment[1] = __float_as_uint(in[1]);
  if constexpr (mistake == Product::wait_one) {
    ptx::wgmma_wait<1>();
  } else if constexpr (mistake != Product::no_wait) {
    ptx::wgmma_wait<0>();
  }
  for (int i = 0; i < 4; ++i) out[4 * thread() + i] = d[i] + d[4 + i] + e[i] + e[4 + i];
  ptx::wgmma_wait<0>(d);
  ptx::settle_registers(e);
  tiles[thread()] = static_cast<float>(fragment[1] & 1);
}

// One warpgroup multiplies what one thread of another fetches. Broken: the tile is given back before it has been read.
template <bool broken>
__global__ void early_release(const __grid_constant__ TensorMap map, float* out) {
  Shared& s = shared_memory();
  if (thread() == 0) {
    ptx::mbarrier_init(&s.full[0], 1);
    ptx::mbarrier_init(&s.empty[0], 128);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (thread() >= 128) {
    for (int round = 0; round < 3 && thread() == 128; ++round) {
      ptx::mbarrier_wait(&s.empty[0], (round + 1) % 2);
      ptx::mbarrier_arrive_expect_tx(&s.full[0], kTile * 4);
      ptx::copy_tensor(s.tiles[0], &map, &s.full[0], 0, round * 4);
    }
    return;
  }
  float d[4] = {};
  const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  ptx::wgmma_fence(d);
  for (int round = 0; round < 3; ++round) {
    ptx::mbarrier_wait(&s.full[0], round % 2);
    ptx::wgmma<Multiplicand::bf16>(d, ones, ptx::matrix_descriptor(s.tiles[0], 256, 128, Swizzle::none), true);
    ptx::wgmma_commit();
    if constexpr (!broken) ptx::wgmma_wait<0>(d);
    ptx::mbarrier_arrive(&s.empty[0]);
  }
  ptx::wgmma_wait<0>(d);
  out[thread()] = d[0] + d[1] + d[2] + d[3];
}

// Broken: three warps are no warpgroup.
template <bool broken>
__global__ void product_of_three_warps(const float* in, float* out) {
  auto* tile = static_cast<float*>(ptx::dynamic_shared_1024());
  if (thread() < 64) tile[thread()] = in[thread()];
  ptx::fence_async_shared();
  __syncthreads();
  float d[4] = {};
  const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  ptx::wgmma_fence(d);
  ptx::wgmma<Multiplicand::bf16>(d, ones, ptx::matrix_descriptor(tile, 128, 128, Swizzle::none), true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  out[thread()] = d[0];
}

[[gnu::noinline, gnu::no_sanitize("thread")]] bool is_made(const float* product) { return *product != 0.0f; }

// Counts, behind the simulator's back, the products of 32 that are made though none needs to be.
__global__ void one_look_at_each_product(const float*, float* out) {
  auto* tile = static_cast<uint32_t*>(ptx::dynamic_shared_1024());
  constexpr uint32_t kOnes = 0x3f803f80, ones[4] = {kOnes, kOnes, kOnes, kOnes};
  if (thread() < 64) tile[thread()] = kOnes;
  ptx::fence_async_shared();
  __syncthreads();
  int made = 0;
  for (int round = 0; round < 32; ++round) {
    float d[4] = {};
    ptx::wgmma_fence(d);
    ptx::wgmma<Multiplicand::bf16>(d, ones, ptx::matrix_descriptor(tile, 128, 128, Swizzle::none), true);
    ptx::wgmma_commit();
    made += is_made(d);
    __syncthreads();  // the first thread that waits waits for all
    ptx::wgmma_wait<0>(d);
  }
  if (thread() == 0) out[0] = static_cast<float>(made);
}

}  // namespace
}  // namespace llmengine
