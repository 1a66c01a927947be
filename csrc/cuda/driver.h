// Functions of the CUDA driver, found at run time: the module loads where there is no driver. Those that want a context
// find it bound to the thread behind bind_device().
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace llmengine::cuda {

// F is the function's type as <cuda.h> declares it, in CUDA 12.0.
template <class F>
F* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state{};
#if CUDART_VERSION >= 12050
  const auto error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &state);
#else
  const auto error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &state);
#endif
  if (error != cudaSuccess || state != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("the CUDA driver has no ") + name + ": CUDA 12 is needed");
  }
  return reinterpret_cast<F*>(found);
}

// The device that is current. Functions of the runtime bind its context to the thread by themselves: a thread that has
// called none yet, as autograd's may be, has none, though the device is current in it.
inline int bind_device() {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  return device;
}

}  // namespace llmengine::cuda
