// Launches of kernels of the long tail (compiled.h).
#pragma once

#include <string>

#include "common/half.h"
#include "cuda/compiled.h"
#include "cuda/launch.cuh"

namespace llmengine::cuda {

// False where the kernel cannot be had: then nothing is launched, and one that is built ahead serves.
bool launch_instance(const LaunchSite& at, const Instance& instance, void** parameters);

template <class... Parameters>
bool launch_compiled(const LaunchSite& at, const Instance& instance, const Parameters&... given) {
  void* parameters[] = {const_cast<void*>(static_cast<const void*>(&given))...};
  return launch_instance(at, instance, parameters);
}

inline std::string argument(bf16) { return "llmengine::bf16"; }
inline std::string argument(f16) { return "llmengine::f16"; }
inline std::string argument(bool value) { return value ? "true" : "false"; }
inline std::string argument(int value) { return std::to_string(value); }

// "llmengine::cuda::kernel<llmengine::bf16, 96, true>"
template <class... Arguments>
std::string instance(const char* kernel, const Arguments&... given) {
  std::string text;
  ((text += (text.empty() ? "" : ", ") + argument(given)), ...);
  return std::string("llmengine::cuda::") + kernel + "<" + text + ">";
}

}  // namespace llmengine::cuda
