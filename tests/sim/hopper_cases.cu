// Small kernels of what sm_90 brought, each right or with one known mistake. case_runs.h runs them,
// tests/sim/test_hopper_cases.py says what the simulator must find.
#include <cuda_runtime.h>

#include <map>
#include <string>

#include "case_runs.h"
#include "cluster_cases.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace llmengine {
namespace {

using ptx::Mbarrier;
using ptx::Multiplicand;
using ptx::TensorMap;

constexpr int kTile = 128;  // floats: a box of 4 rows of 32

struct Shared {
  float tiles[2][kTile];
  Mbarrier full[2], empty[2];
};
__device__ Shared& shared_memory() { return *static_cast<Shared*>(ptx::dynamic_shared_1024()); }
__device__ int thread() { return static_cast<int>(threadIdx.x); }

// ---- boxes ----------------------------------------------------------------------------------------------------------

enum class Box : uint8_t {
  none,
  no_wait,
  parity,
  expectation,
  few_bytes,
  init_fence,
  slots,
  misaligned,
  coordinates,
  fence,
  left_behind
};

// One thread fetches four boxes through two tiles that all have filled with zeros, all turn them round.
template <bool broken, Box name>
__global__ void boxes(const __grid_constant__ TensorMap map, float* out) {
  constexpr Box mistake = broken ? name : Box::none;
  constexpr int kBytes = kTile * sizeof(float);
  Shared& s = shared_memory();
  for (auto& tile : s.tiles) tile[thread()] = 0.0f;
  if constexpr (mistake != Box::fence) ptx::fence_async_shared();
  if (thread() == 0) {
    for (int slot = 0; slot < 2; ++slot) {
      ptx::mbarrier_init(&s.full[slot], 1);
      ptx::mbarrier_init(&s.empty[slot], kTile);
    }
    if constexpr (mistake != Box::init_fence) ptx::mbarrier_init_fence();
  }
  __syncthreads();
  const auto fetch = [&](int round) {
    const int slot = round % 2;
    if constexpr (mistake != Box::slots) ptx::mbarrier_wait(&s.empty[slot], (round / 2 + 1) % 2);
    if constexpr (mistake == Box::expectation) {
      ptx::mbarrier_arrive(&s.full[slot]);
    } else {
      ptx::mbarrier_arrive_expect_tx(&s.full[slot], mistake == Box::few_bytes ? kBytes / 2 : kBytes);
    }
    float* tile = s.tiles[slot] + (mistake == Box::misaligned ? 16 : 0);
    if constexpr (mistake == Box::coordinates) {
      ptx::copy_tensor(tile, &map, &s.full[slot], round * 4);
    } else {
      ptx::copy_tensor(tile, &map, &s.full[slot], 0, round * 4);
    }
  };
  if (thread() == 0) fetch(0);
  const int rounds = mistake == Box::left_behind ? 3 : 4;
  for (int round = 0; round < rounds; ++round) {
    const int slot = round % 2, parity = round / 2 % 2;
    if (thread() == 0 && round < 3) fetch(round + 1);
    if constexpr (mistake == Box::no_wait) {
      __syncthreads();
    } else {
      ptx::mbarrier_wait(&s.full[slot], mistake == Box::parity ? 1 - parity : parity);
    }
    out[round * kTile + thread()] = s.tiles[slot][kTile - 1 - thread()];
    ptx::mbarrier_arrive(&s.empty[slot]);
  }
}

enum class Store : uint8_t { none, fence, fence_behind, sync, wait, exit, read_back };

// All fill a tile, one thread stores it, four times. In the end one thread adds to what has been stored.
template <bool broken, Store name>
__global__ void stores(const __grid_constant__ TensorMap map, const float* in, float* out) {
  constexpr Store mistake = broken ? name : Store::none;
  Shared& s = shared_memory();
  for (int round = 0; round < 4; ++round) {
    s.tiles[0][thread()] = in[round * kTile + thread()];
    if constexpr (mistake != Store::fence && mistake != Store::fence_behind) ptx::fence_async_shared();
    if constexpr (mistake != Store::sync) __syncthreads();
    if (thread() == 0) {
      if constexpr (mistake == Store::fence_behind) ptx::fence_async_shared();
      ptx::store_tensor(&map, s.tiles[0], 0, round * 4);
      ptx::commit_stores();
      if constexpr (mistake != Store::wait && mistake != Store::exit) ptx::wait_store_reads<0>();
      if constexpr (mistake == Store::exit) {
        if (round < 3) ptx::wait_store_reads<0>();
      }
    }
    __syncthreads();
  }
  if (thread() == 0 && mistake != Store::exit) {
    if constexpr (mistake == Store::read_back) {
      ptx::wait_store_reads<0>();
    } else {
      ptx::wait_stores<0>();
    }
    out[0] = out[0] + 1.0f;
  }
}

// A number is written to a tensor, of which a box is fetched. Broken: the fence is one for shared memory.
template <bool broken>
__global__ void fetch_what_was_written(const __grid_constant__ TensorMap map, float* out) {
  Shared& s = shared_memory();
  if (thread() == 0) {
    ptx::mbarrier_init(&s.full[0], 1);
    ptx::mbarrier_init_fence();
    out[3] = 2.0f;
    if constexpr (broken) {
      ptx::fence_async_shared();
    } else {
      ptx::fence_async();
    }
    ptx::mbarrier_arrive_expect_tx(&s.full[0], kTile * 4);
    ptx::copy_tensor(s.tiles[0], &map, &s.full[0], 0, 0);
    ptx::mbarrier_wait(&s.full[0], 0);
    out[kTile] = s.tiles[0][3];
  }
}

// Two warps add a tile to the same place. Broken: one of them writes there instead.
template <bool broken>
__global__ void additions(const __grid_constant__ TensorMap map, const float* in) {
  Shared& s = shared_memory();
  s.tiles[0][thread()] = in[thread()];
  ptx::fence_async_shared();
  __syncthreads();
  if (thread() % 64 != 0) return;
  if (broken && thread() == 0) {
    ptx::store_tensor(&map, s.tiles[0], 0, 0);
  } else {
    ptx::add_tensor(&map, s.tiles[0], 0, 0);
  }
  ptx::commit_stores();
  ptx::wait_store_reads<0>();
}

// The first warp's lanes fetch, and their copies arrive. Broken: before they have been begun.
template <bool broken>
__global__ void copies_that_arrive(const float* in, float* out) {
  Shared& s = shared_memory();
  if (thread() == 0) ptx::mbarrier_init(&s.full[0], 32);
  __syncthreads();
  if (thread() < 32) {
    if constexpr (broken) ptx::mbarrier_arrive_for_copies(&s.full[0]);
    ptx::copy_async_16(s.tiles[0] + 4 * thread(), in + 4 * thread());
    if constexpr (!broken) ptx::mbarrier_arrive_for_copies(&s.full[0]);
  }
  ptx::mbarrier_wait(&s.full[0], 0);
  out[thread()] = s.tiles[0][kTile - 1 - thread()];
}

// ---- products -------------------------------------------------------------------------------------------------------

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

// ---- clusters -------------------------------------------------------------------------------------------------------

enum class Cluster : uint8_t { none, begin, order, relaxed, end, twice, alone, beyond, warp };

// Two blocks write into each other's first tile, and read each other's second.
template <bool broken, Cluster name>
__global__ void neighbours(const float* in, float* out) {
  constexpr Cluster mistake = broken ? name : Cluster::none;
  Shared& s = shared_memory();
  const int other = 1 - ptx::block_in_cluster(), place = static_cast<int>(blockIdx.x) * kTile + thread();
  s.tiles[1][thread()] = in[place];
  if constexpr (mistake == Cluster::alone) ptx::cluster_wait();
  if constexpr (mistake == Cluster::twice) ptx::cluster_arrive();
  if constexpr (mistake != Cluster::begin) ptx::cluster_sync();
  const auto theirs = ptx::map_to_block(s.tiles, mistake == Cluster::beyond ? 2 : other);
  ptx::store_cluster_4(theirs + 4 * thread(), __float_as_uint(in[place]));
  if constexpr (mistake == Cluster::order) {
    __syncthreads();
  } else if constexpr (mistake == Cluster::relaxed) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else if constexpr (mistake == Cluster::warp) {
    if (thread() < 32) __syncthreads();
    ptx::cluster_sync();
  } else {
    ptx::cluster_sync();
  }
  const float read = __uint_as_float(ptx::load_cluster_4(theirs + 4 * (kTile + thread())));
  out[place] = s.tiles[0][kTile - 1 - thread()] + 2.0f * read;
  if constexpr (mistake != Cluster::end) ptx::cluster_sync();
}

enum class Variables : uint8_t { none, begin, order, barrier, bounds };

// The same with __shared__ variables, of which each block has its own: two blocks turn round what is theirs, and write
// into each other's; a box goes to both.
template <bool broken, Variables name>
__global__ void variables(const __grid_constant__ TensorMap map, const float* in, float* out) {
  constexpr Variables mistake = broken ? name : Variables::none;
  __shared__ float own[kTile], given[kTile];
  alignas(128) __shared__ float box[2][kTile];
  __shared__ ptx::Mbarrier full;
  const int block = ptx::block_in_cluster(), place = block * kTile + thread();
  if (thread() == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect_tx(&full, 1024);
  }
  own[thread() + (mistake == Variables::bounds && thread() == 127 ? 1 : 0)] = in[place];
  if constexpr (mistake == Variables::begin) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  if (thread() == 0) ptx::copy_tensor_multicast(box[block], &map, &full, 3, 0, block * 4);
  ptx::store_cluster_4(ptx::map_to_block(given, 1 - block) + 4 * thread(), __float_as_uint(in[place]));
  if constexpr (mistake == Variables::order) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  if (mistake != Variables::barrier || block == 0) ptx::mbarrier_wait(&full, 0);
  const int turned = kTile - 1 - thread();
  out[place] = own[turned] + 2.0f * given[turned] + 3.0f * box[0][turned] + 4.0f * box[1][turned];
}

enum class Message : uint8_t { none, wait, arrival };

// The first block writes to the second, and arrives. Broken: who waits there acquires what its own block did; the
// arrival tells of what has ended alone.
template <bool broken, Message name>
__global__ void message(const float* in, float* out) {
  constexpr Message mistake = broken ? name : Message::none;
  Shared& s = shared_memory();
  if (thread() == 0) ptx::mbarrier_init(&s.full[0], kTile);
  ptx::cluster_sync();
  if (ptx::block_in_cluster() == 0) {
    ptx::store_cluster_4(ptx::map_to_block(s.tiles, 1) + 4 * thread(), __float_as_uint(in[thread()]));
    const auto theirs = ptx::map_to_block(&s.full[0], 1);
    if constexpr (mistake == Message::arrival) {
      ptx::mbarrier_arrive_cluster(theirs);
    } else {
      ptx::mbarrier_release_cluster(theirs);
    }
  } else {
    if constexpr (mistake == Message::wait) {
      ptx::mbarrier_wait(&s.full[0], 0);
    } else {
      ptx::mbarrier_wait_cluster(&s.full[0], 0);
    }
    out[thread()] = s.tiles[0][kTile - 1 - thread()];
  }
}

// Each of two blocks writes the other's tile, which that block's unit then stores. Broken: the fence reaches the
// writer's own block alone.
template <bool broken>
__global__ void fence_for_a_neighbour(const float* in, float* out) {
  Shared& s = shared_memory();
  const int block = ptx::block_in_cluster();
  ptx::cluster_sync();
  const auto theirs = ptx::map_to_block(s.tiles, 1 - block);
  ptx::store_cluster_4(theirs + 4 * thread(), __float_as_uint(in[block * kTile + thread()]));
  if constexpr (broken) {
    ptx::fence_async_shared();
  } else {
    ptx::fence_async_cluster();
  }
  ptx::cluster_sync();
  if (thread() == 0) {
    ptx::store_bulk(out + block * kTile, s.tiles[0], sizeof(s.tiles[0]));
    ptx::commit_stores();
    ptx::wait_stores<0>();
  }
}

enum class Multicast : uint8_t { none, begin, wait, bytes, mask };

// Each of two blocks brings a box to both.
template <bool broken, Multicast name>
__global__ void multicasts(const __grid_constant__ TensorMap map, float* out) {
  constexpr Multicast mistake = broken ? name : Multicast::none;
  Shared& s = shared_memory();
  const int block = ptx::block_in_cluster();
  if (thread() == 0) {
    ptx::mbarrier_init(&s.full[0], 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect_tx(&s.full[0], mistake == Multicast::bytes ? 512 : 1024);
  }
  if constexpr (mistake != Multicast::begin) ptx::cluster_sync();
  if (thread() == 0) {
    const uint16_t blocks = mistake == Multicast::mask ? 7 : 3;
    ptx::copy_tensor_multicast(s.tiles[block], &map, &s.full[0], blocks, 0, block * 4);
  }
  if (mistake != Multicast::wait || block == 0) {
    ptx::mbarrier_wait(&s.full[0], 0);
    out[block * kTile + thread()] = s.tiles[0][thread()] + 2.0f * s.tiles[1][thread()];
  }
}

// ---- registers ------------------------------------------------------------------------------------------------------

// Two of four warpgroups give registers up, the others take them. Broken: more than there are.
template <bool broken>
__global__ void register_pool(const float* in, float* out) {
  if (thread() < 256) {
    ptx::decrease_registers<40>();
  } else {
    ptx::increase_registers<broken ? 240 : 200>();
  }
  out[thread()] = in[thread()];
}

// Broken: to keep more than a thread has.
template <bool broken>
__global__ void register_limit(const float* in, float* out) {
  ptx::decrease_registers<broken ? 136 : 128>();
  out[thread()] = in[thread()];
}

// ---- runs -----------------------------------------------------------------------------------------------------------

TensorMap map_of(const float* data) {
  const TensorView rows = view(const_cast<float*>(data), 16, 32, 32);
  return ptx::encode_tensor_map(tensor_map_fields("rows", rows, {4, 32}, Swizzle::none));
}

template <class... Parameters, class... Given>
void start(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, unsigned cluster, Given... given) {
  launch_cluster(kernel, blocks, threads, cluster, 4096, given...);
}

template <bool broken>
Cases all_cases() {
  const auto from_map = [](auto kernel, unsigned threads = 128, unsigned blocks = 1) {
    return Case{[=](const float* in, float* out) { start(kernel, blocks, threads, blocks, map_of(in), out); }};
  };
  const auto to_map = [](auto kernel) {
    return Case{[=](const float* in, float* out) { start(kernel, 1, 128, 1, map_of(out), in, out); }};
  };
  const auto with_map = [](auto kernel) {
    return Case{[=](const float* in, float* out) { start(kernel, 2, 128, 2, map_of(in), in, out); }};
  };
  const auto plain = [](auto kernel, unsigned threads = 128, unsigned blocks = 1) {
    return Case{[=](const float* in, float* out) { start(kernel, blocks, threads, blocks, in, out); }};
  };
  const auto in_cluster = [](auto kernel) {
    return Case{[=](const float* in, float* out) { start(kernel, 2, 128, 2, map_of(in), map_of(out), in, out); }};
  };
  return {
      {"boxes_no_wait", from_map(boxes<broken, Box::no_wait>)},
      {"boxes_parity", from_map(boxes<broken, Box::parity>)},
      {"boxes_expectation", from_map(boxes<broken, Box::expectation>)},
      {"boxes_few_bytes", from_map(boxes<broken, Box::few_bytes>)},
      {"boxes_init_fence", from_map(boxes<broken, Box::init_fence>)},
      {"boxes_slots", from_map(boxes<broken, Box::slots>)},
      {"boxes_misaligned", from_map(boxes<broken, Box::misaligned>)},
      {"boxes_coordinates", from_map(boxes<broken, Box::coordinates>)},
      {"boxes_fence", from_map(boxes<broken, Box::fence>)},
      {"boxes_left_behind", from_map(boxes<broken, Box::left_behind>)},
      {"stores_fence", to_map(stores<broken, Store::fence>)},
      {"stores_fence_behind", to_map(stores<broken, Store::fence_behind>)},
      {"stores_sync", to_map(stores<broken, Store::sync>)},
      {"stores_wait", to_map(stores<broken, Store::wait>)},
      {"stores_exit", to_map(stores<broken, Store::exit>)},
      {"stores_read_back", to_map(stores<broken, Store::read_back>)},
      {"fetch_what_was_written",
       {[](const float*, float* out) { start(fetch_what_was_written<broken>, 1, 128, 1, map_of(out), out); }}},
      {"additions", {[](const float* in, float* out) { start(additions<broken>, 1, 128, 1, map_of(out), in); }}},
      {"copies_that_arrive", plain(copies_that_arrive<broken>)},
      {"products_no_wait", plain(products<broken, Product::no_wait>)},
      {"products_wait_one", plain(products<broken, Product::wait_one>)},
      {"products_no_fence", plain(products<broken, Product::no_fence>)},
      {"products_touched", plain(products<broken, Product::touched>)},
      {"products_no_fence_async", plain(products<broken, Product::no_fence_async>)},
      {"products_copies_unfenced", plain(products<broken, Product::copies_unfenced>)},
      {"products_overwritten", plain(products<broken, Product::overwritten>)},
      {"products_registers", plain(products<broken, Product::registers>)},
      {"products_branches", plain(products<broken, Product::branches>)},
      {"products_warp", plain(products<broken, Product::warp>)},
      {"products_descriptors", plain(products<broken, Product::descriptors>)},
      {"products_outside", plain(products<broken, Product::outside>)},
      {"products_pattern", plain(products<broken, Product::pattern>)},
      {"early_release", from_map(early_release<broken>, 160)},
      {"product_of_three_warps", plain(product_of_three_warps<broken>, broken ? 96 : 128)},
      {"neighbours_begin", plain(neighbours<broken, Cluster::begin>, 128, 2)},
      {"neighbours_order", plain(neighbours<broken, Cluster::order>, 128, 2)},
      {"neighbours_relaxed", plain(neighbours<broken, Cluster::relaxed>, 128, 2)},
      {"neighbours_end", plain(neighbours<broken, Cluster::end>, 128, 2)},
      {"neighbours_twice", plain(neighbours<broken, Cluster::twice>, 128, 2)},
      {"neighbours_alone", plain(neighbours<broken, Cluster::alone>, 128, 2)},
      {"neighbours_beyond", plain(neighbours<broken, Cluster::beyond>, 128, 2)},
      {"neighbours_warp", plain(neighbours<broken, Cluster::warp>, 128, 2)},
      {"variables_begin", with_map(variables<broken, Variables::begin>)},
      {"variables_order", with_map(variables<broken, Variables::order>)},
      {"variables_barrier", with_map(variables<broken, Variables::barrier>)},
      {"variables_bounds", with_map(variables<broken, Variables::bounds>)},
      {"message", plain(message<broken, Message::wait>, 128, 2)},
      {"message_arrival", plain(message<broken, Message::arrival>, 128, 2)},
      {"fence_for_a_neighbour", plain(fence_for_a_neighbour<broken>, 128, 2)},
      {"multicasts_begin", from_map(multicasts<broken, Multicast::begin>, 128, 2)},
      {"multicasts_wait", from_map(multicasts<broken, Multicast::wait>, 128, 2)},
      {"multicasts_bytes", from_map(multicasts<broken, Multicast::bytes>, 128, 2)},
      {"multicasts_mask", from_map(multicasts<broken, Multicast::mask>, 128, 2)},
      {"cluster_copies", in_cluster(variables_of_clusters<Way::copies>)},
      {"cluster_bulk_copies", in_cluster(variables_of_clusters<Way::bulk_copies>)},
      {"cluster_bulk_stores", in_cluster(variables_of_clusters<Way::bulk_stores>)},
      {"cluster_boxes", in_cluster(variables_of_clusters<Way::boxes>)},
      {"cluster_matrices", in_cluster(variables_of_clusters<Way::matrices>)},
      {"cluster_atomics", in_cluster(variables_of_clusters<Way::atomics>)},
      {"cluster_messages", in_cluster(variables_of_clusters<Way::messages>)},
      {"cluster_own_address", in_cluster(variables_of_clusters<Way::own_address>)},
      {"cluster_rounds", in_cluster(variables_of_clusters<Way::rounds>)},
      {"one_look_at_each_product", plain(one_look_at_each_product)},
      {"register_pool", plain(register_pool<broken>, 512)},
      {"register_limit", plain(register_limit<broken>, 512)},
  };
}

}  // namespace
}  // namespace llmengine

int main(int count, char** arguments) {
  return llmengine::run_cases(count, arguments, llmengine::all_cases<true>(), llmengine::all_cases<false>());
}
