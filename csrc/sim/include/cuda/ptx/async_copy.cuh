// Twin of csrc/cuda/ptx/async_copy.cuh. When a copy takes effect is the schedule's choice (csrc/sim/copies.h).
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

namespace twin {

template <int size>
[[gnu::noinline, gnu::no_sanitize("thread")]] void copy_async(void* shared, const void* global, int bytes) {
  sim::copy_async(shared, global, size, bytes, __builtin_return_address(0));
}

}  // namespace twin

__forceinline__ void copy_async_16(void* shared, const void* global, int bytes = 16) {
  twin::copy_async<16>(shared, global, bytes);
}
__forceinline__ void copy_async_8(void* shared, const void* global, int bytes = 8) {
  twin::copy_async<8>(shared, global, bytes);
}
__forceinline__ void copy_async_4(void* shared, const void* global, int bytes = 4) {
  twin::copy_async<4>(shared, global, bytes);
}

__forceinline__ void commit_copies() { sim::commit_copies(); }

template <int pending>
__forceinline__ void wait_copies() {
  static_assert(pending >= 0);
  sim::wait_copies(pending);
}

}  // namespace llmengine::ptx
