// The way in which kernels that are built ahead are launched: on the caller's stream, with an error that names kernel
// and shapes. Those that are compiled when they are first used are launched by compiled.cuh, with the same errors.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/tensor.h"
#include "cuda/device.h"

namespace llmengine::cuda {

inline constexpr size_t kSharedWithoutOptIn = 48 << 10;

struct LaunchSite {
  const char* kernel;
  dim3 grid, block;
  cudaStream_t stream;
  const TensorView& operand;  // the one whose shape a message tells
  size_t shared_bytes = 0;
  dim3 cluster = {1, 1, 1};  // blocks that run together (ptx/cluster.cuh; sm_90)
};

[[noreturn]] inline void fail(const LaunchSite& at, const std::string& error) {
  const auto shape = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  const bool clusters = at.cluster.x * at.cluster.y * at.cluster.z > 1;
  throw std::runtime_error(std::string(at.kernel) + " of " + name(at.operand.dtype) + " " + at.operand.shape() + ": " +
                           error + " (grid " + shape(at.grid) + ", block " + shape(at.block) +
                           (clusters ? ", cluster " + shape(at.cluster) : "") + ", " + std::to_string(at.shared_bytes) +
                           " bytes of dynamic shared memory)");
}
[[noreturn]] inline void fail(const LaunchSite& at, cudaError_t error) { fail(at, cudaGetErrorString(error)); }

// A grid without blocks is an empty input: nothing is launched. Nothing here synchronises, so a stream may be
// capturing.
template <class... Parameters>
void launch(const LaunchSite& at, void (*kernel)(Parameters...), const std::type_identity_t<Parameters>&... given) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return;
  if (at.shared_bytes > kSharedWithoutOptIn) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(at.shared_bytes));
    if (error != cudaSuccess) fail(at, error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = at.stream;
  cudaLaunchAttribute cluster{};
  if (at.cluster.x * at.cluster.y * at.cluster.z > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = at.cluster.x, cluster.val.clusterDim.y = at.cluster.y;
    cluster.val.clusterDim.z = at.cluster.z;
    config.attrs = &cluster, config.numAttrs = 1;
  }
  const auto error = cudaLaunchKernelEx(&config, kernel, given...);
  if (error != cudaSuccess) fail(at, error);
}

inline cudaStream_t cuda_stream(Stream stream) { return reinterpret_cast<cudaStream_t>(stream.handle); }

}  // namespace llmengine::cuda
