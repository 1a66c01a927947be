#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/device.h"

namespace llmengine::cuda {

static std::string spelled(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

std::string device_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count == 0 ? "there is no CUDA device" : problem_of_capability(compute_capability());
}

std::string problem_of_capability(int capability) {
  if (capability >= 80) return "";
  return "the GPU has compute capability " + spelled(capability) + "; allowed: 8.0 and above";
}

static int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  return value;
}

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

int cache_bytes() { return attribute(cudaDevAttrL2CacheSize); }

int compute_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

void check_is_hopper(const std::string& what) {
  const int found = compute_capability();
  if (found == 90) return;
  throw std::runtime_error(what + ": the device has compute capability " + spelled(found) + "; allowed: 9.0");
}

}  // namespace llmengine::cuda
