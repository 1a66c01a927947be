// The tensor map as the device takes it: 128 opaque bytes, made by the driver on the host. A kernel has it as a
// parameter `const __grid_constant__ ptx::TensorMap map` and hands its address to tensor_copy.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/driver.h"
#include "cuda/tensor_map.h"

namespace llmengine::ptx {

struct TensorMap {
  CUtensorMap words;
};

inline TensorMap encode_tensor_map(const TensorMapFields& fields) {
  static const auto encode = cuda::driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const auto type = [](DType dtype) {
    switch (dtype) {
      case DType::f32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
      case DType::bf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
      case DType::f16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
      case DType::boolean: return CU_TENSOR_MAP_DATA_TYPE_UINT8;  // bytes of any kind
      case DType::i32: return CU_TENSOR_MAP_DATA_TYPE_INT32;
      default: throw std::invalid_argument("tensor map of " + std::string(name(dtype)));
    }
  };
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5], steps[5];
  for (int d = 0; d < fields.rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(fields.sizes[d]);
    box[d] = static_cast<cuuint32_t>(fields.box[d]), steps[d] = static_cast<cuuint32_t>(fields.steps[d]);
    if (d > 0) strides[d - 1] = static_cast<cuuint64_t>(fields.strides[d]);
  }
  TensorMap map;
  cuda::bind_device();
  const CUresult result =
      encode(&map.words, type(fields.dtype), static_cast<cuuint32_t>(fields.rank), const_cast<void*>(fields.data),
             sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(fields.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace llmengine::ptx
