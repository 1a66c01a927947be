// Twin of csrc/cuda/ptx/tensor_copy.cuh. What is copied, and when, stands in csrc/sim/bulk.h.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tensor_map.cuh"

namespace llmengine::ptx {

namespace twin {

// Blocks 0: the own one.
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void load_tensor(void* shared, const TensorMap* map,
                                                                      const sim::BoxPlace& at, Mbarrier* barrier,
                                                                      uint32_t blocks) {
  sim::load_tensor(shared, map->fields, at, barrier, blocks, __builtin_return_address(0));
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void store_tensor(const TensorMap* map, const sim::BoxPlace& at,
                                                                       const void* shared, sim::Adds adds) {
  sim::store_tensor(map->fields, at, shared, adds, __builtin_return_address(0));
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void store_bulk(void* global, const void* shared, int bytes,
                                                                     sim::Adds adds) {
  sim::store_bulk(global, shared, bytes, adds, __builtin_return_address(0));
}

}  // namespace twin

__forceinline__ void prefetch_tensor_map(const TensorMap*) {}

template <class... Place>
__forceinline__ void copy_tensor(void* shared, const TensorMap* map, Mbarrier* barrier, Place... place) {
  const sim::BoxPlace at{sizeof...(place), {static_cast<int>(place)...}};
  twin::load_tensor(shared, map, at, barrier, 0);
}
template <class... Place>
__forceinline__ void copy_tensor_multicast(void* shared, const TensorMap* map, Mbarrier* barrier, uint16_t blocks,
                                           Place... place) {
  const sim::BoxPlace at{sizeof...(place), {static_cast<int>(place)...}};
  twin::load_tensor(shared, map, at, barrier, blocks == 0 ? ~0u : blocks);
}
template <class... Place>
__forceinline__ void store_tensor(const TensorMap* map, const void* shared, Place... place) {
  const sim::BoxPlace at{sizeof...(place), {static_cast<int>(place)...}};
  twin::store_tensor(map, at, shared, sim::Adds::nothing);
}
template <class... Place>
__forceinline__ void add_tensor(const TensorMap* map, const void* shared, Place... place) {
  const sim::BoxPlace at{sizeof...(place), {static_cast<int>(place)...}};
  twin::store_tensor(map, at, shared, sim::Adds::floats);
}

__forceinline__ void store_bulk(void* global, const void* shared, int bytes) {
  twin::store_bulk(global, shared, bytes, sim::Adds::nothing);
}
__forceinline__ void add_bulk(float* global, const float* shared, int bytes) {
  twin::store_bulk(global, shared, bytes, sim::Adds::floats);
}
__forceinline__ void add_bulk(int32_t* global, const int32_t* shared, int bytes) {
  twin::store_bulk(global, shared, bytes, sim::Adds::integers);
}

__forceinline__ void commit_stores() { sim::commit_stores(); }
template <int pending>
__forceinline__ void wait_stores() {
  sim::wait_stores(pending, false);
}
template <int pending>
__forceinline__ void wait_store_reads() {
  sim::wait_stores(pending, true);
}

__forceinline__ void fence_async_shared() { sim::fence_async(sim::Reach::block); }
__forceinline__ void fence_async_cluster() { sim::fence_async(sim::Reach::cluster); }
__forceinline__ void fence_async() { sim::fence_async(sim::Reach::global); }

}  // namespace llmengine::ptx
