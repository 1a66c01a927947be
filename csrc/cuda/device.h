// The device and its streams, for code that does not know CUDA's headers.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/tensor.h"

namespace llmengine::cuda {

struct Stream {
  int64_t handle = 0;  // a cudaStream_t, as PyTorch gives it; 0 is the default stream
};

inline constexpr std::initializer_list<DType> kFloatTypes = {DType::f32, DType::bf16, DType::f16};

// Why nothing can run here, or nothing: no driver, no device, one that is too old. The runtime is linked statically and
// finds the driver when first asked, so the module loads everywhere.
std::string device_problem();
std::string problem_of_capability(int capability);

int multiprocessors();     // of the current device
int cache_bytes();         // its second-level cache
int compute_capability();  // 90 for 9.0
void check_is_hopper(const std::string& what);

}  // namespace llmengine::cuda
