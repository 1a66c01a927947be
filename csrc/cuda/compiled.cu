#include <cuda.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/compiled.cuh"
#include "cuda/driver.h"

namespace llmengine::cuda {
namespace {

thread_local std::vector<std::string> launched;

Compiler compiler;  // none: no kernel of the long tail can be had

// Of a driver's function, called for a launch.
void must(CUresult result, const char* function, const LaunchSite& at) {
  if (result == CUDA_SUCCESS) return;
  static const auto text_of = driver_function<decltype(cuGetErrorString)>("cuGetErrorString");
  const char* text = nullptr;
  if (text_of(result, &text) != CUDA_SUCCESS) text = "unknown";
  fail(at, std::string(function) + ": error " + std::to_string(static_cast<int>(result)) + ", " + text +
               "; LLMENGINE_CUDA_JIT=0 does without kernels compiled at run time");
}

// A library belongs to no context, so that a kernel runs on every device of its architecture.
CUkernel load(const MachineCode& code, const LaunchSite& at) {
  static const auto load_data = driver_function<decltype(cuLibraryLoadData)>("cuLibraryLoadData");
  static const auto get_kernel = driver_function<decltype(cuLibraryGetKernel)>("cuLibraryGetKernel");
  CUlibrary library = nullptr;  // never unloaded: it may be running when the process ends
  CUkernel kernel = nullptr;
  must(load_data(&library, code.image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData", at);
  must(get_kernel(&kernel, library, code.name.c_str()), "cuLibraryGetKernel", at);
  return kernel;
}

// Null where it cannot be had, which is remembered. The table is not locked while a kernel is compiled: the compiler
// wants Python's lock, and who has that may be waiting here. So two threads may load the same kernel; one is kept.
CUkernel find(const Instance& instance, const LaunchSite& at) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::string>, CUkernel> kernels;
  const std::pair key{compute_capability(), instance.kernel};
  {
    const std::lock_guard lock(mutex);
    if (const auto found = kernels.find(key); found != kernels.end()) return found->second;
  }
  const auto code = compiler ? compiler(instance, key.first) : std::nullopt;
  const CUkernel kernel = code ? load(*code, at) : nullptr;
  const std::lock_guard lock(mutex);
  return kernels.emplace(key, kernel).first->second;
}

}  // namespace

void set_compiler(Compiler given) { compiler = std::move(given); }

bool launch_instance(const LaunchSite& site, const Instance& instance, void** parameters) {
  static const auto set_attribute = driver_function<decltype(cuKernelSetAttribute)>("cuKernelSetAttribute");
  static const auto launch_kernel = driver_function<decltype(cuLaunchKernelEx)>("cuLaunchKernelEx");
  LaunchSite at = site;
  at.kernel = instance.kernel.c_str();
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return true;
  if (at.cluster.x * at.cluster.y * at.cluster.z > 1) fail(at, "kernels compiled at run time have no clusters");
  const int device = bind_device();
  const CUkernel kernel = find(instance, at);
  if (!kernel) return false;
  if (at.shared_bytes > kSharedWithoutOptIn) {
    must(set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(at.shared_bytes), kernel,
                       device),
         "cuKernelSetAttribute", at);
  }
  CUlaunchConfig config{};
  config.gridDimX = at.grid.x, config.gridDimY = at.grid.y, config.gridDimZ = at.grid.z;
  config.blockDimX = at.block.x, config.blockDimY = at.block.y, config.blockDimZ = at.block.z;
  config.sharedMemBytes = static_cast<unsigned>(at.shared_bytes);
  config.hStream = at.stream;
  must(launch_kernel(&config, reinterpret_cast<CUfunction>(kernel), parameters, nullptr), "cuLaunchKernelEx", at);
  launched.push_back(instance.kernel);
  return true;
}

std::vector<std::string> take_launched() { return std::exchange(launched, {}); }

}  // namespace llmengine::cuda
