// Twin of csrc/cuda/ptx/mbarrier.cuh. The state lies in the simulator (csrc/sim/mbarrier.h).
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

struct Mbarrier {
  uint64_t state;
};

namespace twin {

[[gnu::noinline, gnu::no_sanitize("thread")]] inline void init(Mbarrier* barrier, int arrivals) {
  sim::mbarrier_init(barrier, arrivals, __builtin_return_address(0));
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void arrive(const char* operation, Mbarrier* barrier, bool arrives,
                                                                 int bytes) {
  sim::mbarrier_arrive(operation, reinterpret_cast<uintptr_t>(barrier), arrives, bytes, __builtin_return_address(0));
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void arrive_for_copies(Mbarrier* barrier, bool counted) {
  sim::mbarrier_arrive_for_copies(barrier, counted, __builtin_return_address(0));
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline bool try_wait(Mbarrier* barrier, int parity, bool cluster,
                                                                   sim::Site site) {
  return sim::mbarrier_try_wait(barrier, parity, cluster, __builtin_return_address(0), site);
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void copy(void* shared, const void* global, int bytes,
                                                               Mbarrier* barrier) {
  sim::copy_bulk(shared, global, bytes, barrier, __builtin_return_address(0));
}

}  // namespace twin

__forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) { twin::init(barrier, arrivals); }
__forceinline__ void mbarrier_init_fence() { sim::mbarrier_init_fence(); }
__forceinline__ void mbarrier_arrive(Mbarrier* barrier) { twin::arrive("mbarrier_arrive", barrier, true, 0); }
__forceinline__ void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
  twin::arrive("mbarrier_arrive_expect_tx", barrier, true, bytes);
}
__forceinline__ void mbarrier_expect_tx(Mbarrier* barrier, int bytes) {
  twin::arrive("mbarrier_expect_tx", barrier, false, bytes);
}
__forceinline__ void mbarrier_arrive_for_copies(Mbarrier* barrier) { twin::arrive_for_copies(barrier, true); }
__forceinline__ void mbarrier_arrive_also_for_copies(Mbarrier* barrier) { twin::arrive_for_copies(barrier, false); }
__forceinline__ bool mbarrier_try_wait(Mbarrier* barrier, int parity, sim::Site site = sim::Site::current()) {
  return twin::try_wait(barrier, parity, false, site);
}
__forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity, sim::Site site = sim::Site::current()) {
  while (!twin::try_wait(barrier, parity, false, site)) {}
}
__forceinline__ void copy_bulk(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  twin::copy(shared, global, bytes, barrier);
}

}  // namespace llmengine::ptx
