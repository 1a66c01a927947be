// What the cases of sm_90 share: two tiles and their mbarriers in dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tensor_copy.cuh"

namespace llmengine {
namespace {

using ptx::Mbarrier;
using ptx::TensorMap;

constexpr int kTile = 128;  // floats: a box of 4 rows of 32

struct Shared {
  float tiles[2][kTile];
  Mbarrier full[2], empty[2];
};
__device__ Shared& shared_memory() { return *static_cast<Shared*>(ptx::dynamic_shared_1024()); }
__device__ int thread() { return static_cast<int>(threadIdx.x); }

}  // namespace
}  // namespace llmengine
