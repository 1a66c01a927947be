// Functions of floats that kernels share.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/math.cuh"

namespace llmengine::cuda {

// exp(x) in two instructions: off by 2^-22 of itself, and by the rounding of x log2 e, as far as x is from 0.
__device__ __forceinline__ float exp_of(float x) { return ptx::exp2_approx(x * 1.44269504f); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

}  // namespace llmengine::cuda
