// Twin of csrc/cuda/ptx/barrier.cuh.
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

__forceinline__ void barrier_sync(int id, int threads, sim::Site site = sim::Site::current()) {
  sim::named_barrier(id, threads, true, site);
}
__forceinline__ void barrier_arrive(int id, int threads, sim::Site site = sim::Site::current()) {
  sim::named_barrier(id, threads, false, site);
}

}  // namespace llmengine::ptx
