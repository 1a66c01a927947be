// Twin of csrc/cuda/ptx/memory.cuh. Cache hints change no result.
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

namespace twin {

template <class Word>
[[gnu::noinline, gnu::no_sanitize("thread")]] Word load(const void* address) {
  sim::touch(address, sizeof(Word), sim::Touch::read, __builtin_return_address(0));
  Word word;
  std::memcpy(&word, address, sizeof(Word));
  return word;
}

template <class Word>
[[gnu::noinline, gnu::no_sanitize("thread")]] void store(void* address, Word word) {
  sim::touch(address, sizeof(Word), sim::Touch::write, __builtin_return_address(0));
  std::memcpy(address, &word, sizeof(Word));
}

}  // namespace twin

__forceinline__ uint4 load_16_once(const void* address) { return twin::load<uint4>(address); }
__forceinline__ uint4 load_16(const void* address) { return twin::load<uint4>(address); }
__forceinline__ uint2 load_8(const void* address) { return twin::load<uint2>(address); }
__forceinline__ void store_16(void* address, uint4 word) { twin::store(address, word); }
__forceinline__ void store_8(void* address, uint2 word) { twin::store(address, word); }
__forceinline__ void* dynamic_shared() { return sim::dynamic_shared(); }
__forceinline__ void* dynamic_shared_1024() { return sim::dynamic_shared(); }

}  // namespace llmengine::ptx
