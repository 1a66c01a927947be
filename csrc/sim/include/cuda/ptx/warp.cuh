// Twin of csrc/cuda/ptx/warp.cuh. How many registers there are stands in csrc/sim/cluster.cpp.
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

__forceinline__ bool elect_one(sim::Site site = sim::Site::current()) { return sim::elect_one(site); }

template <int count>
__forceinline__ void increase_registers(sim::Site site = sim::Site::current()) {
  sim::set_registers("increase_registers", count, true, site);
}
template <int count>
__forceinline__ void decrease_registers(sim::Site site = sim::Site::current()) {
  sim::set_registers("decrease_registers", count, false, site);
}

}  // namespace llmengine::ptx
