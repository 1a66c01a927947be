// What csrc/cuda/ uses of CUDA's language and runtime, for a host C++ compiler: this file stands first on the
// simulator's include path, where nvcc finds NVIDIA's. Threads run in csrc/sim/.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "sim/device.h"

// ---- the language ---------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((aligned(llmengine::sim::kSharedRoom)))

namespace llmengine::sim {

// threadIdx.x and its like: asked for when they are read, since one variable serves all threads.
template <Index3 (*ask)()>
struct Place {
  struct X {
    operator unsigned() const { return ask().x; }
  } x;
  struct Y {
    operator unsigned() const { return ask().y; }
  } y;
  struct Z {
    operator unsigned() const { return ask().z; }
  } z;
};

}  // namespace llmengine::sim

inline constexpr llmengine::sim::Place<llmengine::sim::thread_index> threadIdx{};
inline constexpr llmengine::sim::Place<llmengine::sim::block_index> blockIdx{};
inline constexpr llmengine::sim::Place<llmengine::sim::block_shape> blockDim{};
inline constexpr llmengine::sim::Place<llmengine::sim::grid_shape> gridDim{};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- threads that meet ----------------------------------------------------------------------------------------------

inline void __syncthreads(llmengine::sim::Site site = llmengine::sim::Site::current()) {
  llmengine::sim::block_barrier(site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, llmengine::sim::Site site = llmengine::sim::Site::current()) {
  llmengine::sim::meet_warp("__syncwarp", mask, 0, true, site);
}

namespace llmengine::sim {

template <class T>
T shuffled(const char* operation, unsigned mask, T value, int width, Site site, auto source_of) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Gathered gathered = meet_warp(operation, mask, bits, false, site);
  const int here = lane(), first = here / width * width, source = source_of(here, first);
  // A source behind its segment is the lane itself, as PTX has it; one before is left to a butterfly alone.
  const uint64_t found = value_of_lane(operation, gathered, source < first + width ? source : here, site);
  std::memcpy(&value, &found, sizeof(T));
  return value;
}

}  // namespace llmengine::sim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              llmengine::sim::Site site = llmengine::sim::Site::current()) {
  return llmengine::sim::shuffled("__shfl_sync", mask, value, width, site,
                                  [=](int, int first) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  llmengine::sim::Site site = llmengine::sim::Site::current()) {
  return llmengine::sim::shuffled("__shfl_xor_sync", mask, value, width, site,
                                  [=](int here, int) { return here ^ lanes; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   llmengine::sim::Site site = llmengine::sim::Site::current()) {
  return llmengine::sim::shuffled("__shfl_down_sync", mask, value, width, site,
                                  [=](int here, int) { return here + static_cast<int>(delta); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 llmengine::sim::Site site = llmengine::sim::Site::current()) {
  return llmengine::sim::shuffled("__shfl_up_sync", mask, value, width, site, [=](int here, int first) {
    return here - static_cast<int>(delta) < first ? here : here - static_cast<int>(delta);
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              llmengine::sim::Site site = llmengine::sim::Site::current()) {
  const auto gathered = llmengine::sim::meet_warp("__ballot_sync", mask, predicate != 0, false, site);
  unsigned votes = 0;
  for (int l = 0; l < 32; ++l) votes |= static_cast<unsigned>((gathered.lanes >> l & 1) && gathered.value[l]) << l;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, llmengine::sim::Site site = llmengine::sim::Site::current()) {
  const auto gathered = llmengine::sim::meet_warp("__any_sync", mask, predicate != 0, false, site);
  return std::any_of(gathered.value.begin(), gathered.value.end(), [](uint64_t v) { return v != 0; });
}
inline int __all_sync(unsigned mask, int predicate, llmengine::sim::Site site = llmengine::sim::Site::current()) {
  const auto gathered = llmengine::sim::meet_warp("__all_sync", mask, predicate == 0, false, site);
  return std::none_of(gathered.value.begin(), gathered.value.end(), [](uint64_t v) { return v != 0; });
}

// ---- atomics --------------------------------------------------------------------------------------------------------

namespace llmengine::sim {

template <class T>
[[gnu::noinline, gnu::no_sanitize("thread")]] T changed_atomically(T* address, auto change) {
  touch(address, sizeof(T), Touch::atomic, __builtin_return_address(0));
  const T before = *address;  // nobody runs between: fibres change only where they are told to
  *address = change(before);
  return before;
}

}  // namespace llmengine::sim

template <class T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
  return llmengine::sim::changed_atomically(address, [=](T old) { return old + value; });
}
template <class T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
  return llmengine::sim::changed_atomically(address, [=](T old) { return std::max(old, value); });
}
template <class T>
__forceinline__ T atomicMin(T* address, std::type_identity_t<T> value) {
  return llmengine::sim::changed_atomically(address, [=](T old) { return std::min(old, value); });
}
template <class T>
__forceinline__ T atomicExch(T* address, std::type_identity_t<T> value) {
  return llmengine::sim::changed_atomically(address, [=](T) { return value; });
}
template <class T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return llmengine::sim::changed_atomically(address, [=](T old) { return old == expected ? value : old; });
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
// A product that is rounded: nvcc contracts it with no sum. The simulator is compiled without contraction.
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

// ---- the runtime ----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const auto& device = llmengine::sim::kDevice;
  *value = which == cudaDevAttrMultiProcessorCount      ? llmengine::sim::multiprocessors
           : which == cudaDevAttrL2CacheSize            ? device.cache_bytes
           : which == cudaDevAttrComputeCapabilityMajor ? device.compute_capability / 10
                                                        : device.compute_capability % 10;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

namespace llmengine::sim {

// A launch as the hardware would take it; grids, blocks and clusters beyond its limits are refused, and clusters of
// blocks that are not whole warps, whose threads the simulator could not number. Variables of a kernel and dynamic
// memory must fit into a block's shared memory together.
template <class... Parameters, class... Given>
cudaError_t launched(const cudaLaunchConfig_t& at, void (*kernel)(Parameters...), const Given&... given) {
  const Index3 grid{at.gridDim.x, at.gridDim.y, at.gridDim.z}, block{at.blockDim.x, at.blockDim.y, at.blockDim.z};
  Index3 cluster;
  for (unsigned i = 0; i < at.numAttrs; ++i) {
    const auto& asked = at.attrs[i].val.clusterDim;
    cluster = {asked.x, asked.y, asked.z};
  }
  constexpr unsigned kPortable = 8;  // blocks that every processor can run together
  const bool clusters_fit =
      cluster.count() == 1 || (cluster.count() > 0 && cluster.count() <= kPortable && grid.x % cluster.x == 0 &&
                               grid.y % cluster.y == 0 && grid.z % cluster.z == 0 && block.count() % 32 == 0);
  const size_t shared_bytes = static_shared_bytes(reinterpret_cast<const void*>(kernel));
  const bool shared_fits =
      shared_bytes <= kStaticSharedBytes && shared_bytes + at.dynamicSmemBytes <= kDevice.shared_bytes_per_block;
  const bool fits = clusters_fit && shared_fits && grid.count() > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                    grid.z <= 65535 && block.count() > 0 && block.count() <= 1024 && block.z <= 64;
  if (!fits) return cudaErrorInvalidConfiguration;
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {given...}};
  run({reinterpret_cast<const void*>(kernel), grid, block, cluster, at.dynamicSmemBytes,
       [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->parameters); }, &call,
       sizeof(call), at.stream});
  return cudaSuccess;
}

}  // namespace llmengine::sim

template <class... Parameters, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* at, void (*kernel)(Parameters...), Given&&... given) {
  return llmengine::sim::launched(*at, kernel, given...);
}
