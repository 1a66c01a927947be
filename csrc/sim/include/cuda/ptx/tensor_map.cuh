// Twin of csrc/cuda/ptx/tensor_map.cuh: the fields as they are.
#pragma once

#include <cuda_runtime.h>

#include "cuda/tensor_map.h"

namespace llmengine::ptx {

struct alignas(64) TensorMap {
  TensorMapFields fields;
};

inline TensorMap encode_tensor_map(const TensorMapFields& fields) { return {fields}; }

}  // namespace llmengine::ptx
