// Twin of csrc/cuda/ptx/made_here.cuh.
#pragma once

#include <cuda_runtime.h>

namespace llmengine::ptx {

template <class Number>
__forceinline__ Number made_here(Number number) {
  return number;
}

}  // namespace llmengine::ptx
