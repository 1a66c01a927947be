// Twin of csrc/cuda/ptx/cluster.cuh. Each block's shared memory has addresses of its own (csrc/sim/memory.h).
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/mbarrier.cuh"

namespace llmengine::ptx {

struct ClusterAddress {
  uintptr_t address;

  ClusterAddress operator+(uint32_t bytes) const { return {address + bytes}; }
};

namespace twin {

[[gnu::noinline, gnu::no_sanitize("thread")]] inline ClusterAddress map_to_block(const void* shared, int block) {
  return {sim::map_to_block(shared, block, __builtin_return_address(0))};
}
template <class Word>
[[gnu::noinline, gnu::no_sanitize("thread")]] Word load_cluster(ClusterAddress from) {
  const auto there = sim::touch_remote(from.address, sizeof(Word), sim::Touch::read, __builtin_return_address(0));
  Word word;
  std::memcpy(&word, reinterpret_cast<const void*>(there), sizeof(Word));
  return word;
}
template <class Word>
[[gnu::noinline, gnu::no_sanitize("thread")]] void store_cluster(ClusterAddress to, Word word) {
  const auto there = sim::touch_remote(to.address, sizeof(Word), sim::Touch::write, __builtin_return_address(0));
  std::memcpy(reinterpret_cast<void*>(there), &word, sizeof(Word));
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void arrive_cluster(ClusterAddress barrier) {
  sim::mbarrier_arrive_cluster("mbarrier_arrive_cluster", barrier.address, false, __builtin_return_address(0));
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void release_cluster(ClusterAddress barrier) {
  sim::mbarrier_arrive_cluster("mbarrier_release_cluster", barrier.address, true, __builtin_return_address(0));
}

}  // namespace twin

__forceinline__ int block_in_cluster() { return sim::block_in_cluster(); }
__forceinline__ int blocks_of_cluster() { return sim::blocks_of_cluster(); }
__forceinline__ void cluster_arrive(sim::Site site = sim::Site::current()) { sim::cluster_arrive(true, site); }
__forceinline__ void cluster_arrive_relaxed(sim::Site site = sim::Site::current()) { sim::cluster_arrive(false, site); }
__forceinline__ void cluster_wait(sim::Site site = sim::Site::current()) { sim::cluster_wait(site); }
__forceinline__ void cluster_sync(sim::Site site = sim::Site::current()) {
  sim::cluster_arrive(true, site);
  sim::cluster_wait(site);
}

__forceinline__ ClusterAddress map_to_block(const void* shared, int block) { return twin::map_to_block(shared, block); }
__forceinline__ uint32_t load_cluster_4(ClusterAddress from) { return twin::load_cluster<uint32_t>(from); }
__forceinline__ uint4 load_cluster_16(ClusterAddress from) { return twin::load_cluster<uint4>(from); }
__forceinline__ void store_cluster_4(ClusterAddress to, uint32_t word) { twin::store_cluster(to, word); }
__forceinline__ void store_cluster_16(ClusterAddress to, uint4 word) { twin::store_cluster(to, word); }

__forceinline__ void mbarrier_arrive_cluster(ClusterAddress barrier) { twin::arrive_cluster(barrier); }
__forceinline__ void mbarrier_release_cluster(ClusterAddress barrier) { twin::release_cluster(barrier); }
__forceinline__ void mbarrier_wait_cluster(Mbarrier* barrier, int parity, sim::Site site = sim::Site::current()) {
  while (!twin::try_wait(barrier, parity, true, site)) {}
}

}  // namespace llmengine::ptx
