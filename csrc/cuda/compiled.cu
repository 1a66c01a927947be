#include <cuda.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cuda/compiled.cuh"
#include "cuda/driver.h"

namespace llmengine::cuda {
namespace {

thread_local std::vector<std::string> launched;

Compiler compiler;  // none: no kernel of the long tail can be had

void must(CUresult result, const char* function, const Instance& instance) {
  if (result == CUDA_SUCCESS) return;
  throw std::runtime_error(instance.kernel + ": " + function + ": error " + std::to_string(static_cast<int>(result)) +
                           "; LLMENGINE_CUDA_JIT=0 does without kernels compiled at run time");
}

// A library belongs to no context, so that a kernel runs on every device of its architecture.
CUkernel load(const MachineCode& code, const Instance& instance) {
  static const auto load_data = driver_function<decltype(cuLibraryLoadData)>("cuLibraryLoadData");
  static const auto get_kernel = driver_function<decltype(cuLibraryGetKernel)>("cuLibraryGetKernel");
  CUlibrary library = nullptr;  // never unloaded: it may be running when the process ends
  CUkernel kernel = nullptr;
  must(load_data(&library, code.image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData", instance);
  must(get_kernel(&kernel, library, code.name.c_str()), "cuLibraryGetKernel", instance);
  return kernel;
}

// Null where it cannot be had, which is remembered. The table is not locked while a kernel is compiled: the compiler
// wants Python's lock, and who has that may be waiting here. So two threads may load the same kernel; one is kept.
CUkernel find(const Instance& instance) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::string>, CUkernel> kernels;
  const std::pair key{compute_capability(), instance.kernel};
  {
    const std::lock_guard lock(mutex);
    if (const auto found = kernels.find(key); found != kernels.end()) return found->second;
  }
  const auto code = compiler ? compiler(instance, key.first) : std::nullopt;
  const CUkernel kernel = code ? load(*code, instance) : nullptr;
  const std::lock_guard lock(mutex);
  return kernels.emplace(key, kernel).first->second;
}

int device_of(const Instance& instance) {
  int device = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) {
    throw std::runtime_error(instance.kernel + ": " + cudaGetErrorString(error));
  }
  return device;
}

}  // namespace

void set_compiler(Compiler given) { compiler = std::move(given); }

bool launch_instance(const LaunchSite& at, const Instance& instance, void** parameters) {
  static const auto set_attribute = driver_function<decltype(cuKernelSetAttribute)>("cuKernelSetAttribute");
  static const auto launch_kernel = driver_function<decltype(cuLaunchKernelEx)>("cuLaunchKernelEx");
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return true;
  const CUkernel kernel = find(instance);
  if (!kernel) return false;
  if (at.shared_bytes > kSharedWithoutOptIn) {
    must(set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(at.shared_bytes), kernel,
                       device_of(instance)),
         "cuKernelSetAttribute", instance);
  }
  CUlaunchConfig config{};
  config.gridDimX = at.grid.x, config.gridDimY = at.grid.y, config.gridDimZ = at.grid.z;
  config.blockDimX = at.block.x, config.blockDimY = at.block.y, config.blockDimZ = at.block.z;
  config.sharedMemBytes = static_cast<unsigned>(at.shared_bytes);
  config.hStream = at.stream;
  must(launch_kernel(&config, reinterpret_cast<CUfunction>(kernel), parameters, nullptr), "cuLaunchKernelEx", instance);
  launched.push_back(instance.kernel);
  return true;
}

std::vector<std::string> take_launched() { return std::exchange(launched, {}); }

}  // namespace llmengine::cuda
