// Twin of csrc/cuda/ptx/wgmma.cuh. When a product takes effect, and what it wants, stands in csrc/sim/wgmma.h.
#pragma once

#include <cuda_runtime.h>

#include "cuda/tensor_map.h"
#include "sim/wgmma.h"

namespace llmengine::ptx {

enum class Multiplicand : uint8_t { bf16, f16, tf32, e4m3, e5m2_e4m3 };
enum class Major : uint8_t { k, mn };

struct MatrixDescriptor {
  uint64_t bits;

  MatrixDescriptor advanced(int bytes) const { return {bits + static_cast<uint64_t>(bytes >> 4)}; }
};

namespace twin {

constexpr bool has_sixteen_bits(Multiplicand m) { return m == Multiplicand::bf16 || m == Multiplicand::f16; }
constexpr sim::Element left_of(Multiplicand m) {
  return m == Multiplicand::e5m2_e4m3 ? sim::Element::e5m2 : static_cast<sim::Element>(m);
}
constexpr sim::Element right_of(Multiplicand m) {
  return m == Multiplicand::e5m2_e4m3 ? sim::Element::e4m3 : static_cast<sim::Element>(m);
}

[[gnu::noinline, gnu::no_sanitize("thread")]] inline void multiply(const char* operation, const sim::WgmmaShape& shape,
                                                                   sim::WgmmaLane lane, sim::Site site) {
  lane.return_address = __builtin_return_address(0);
  sim::wgmma(operation, shape, lane, site);
}
[[gnu::noinline, gnu::no_sanitize("thread")]] inline void settle(const float* d, int count) {
  sim::settle_registers(d, count, __builtin_return_address(0));
}

}  // namespace twin

__forceinline__ MatrixDescriptor matrix_descriptor(const void* tile, int leading, int stride, Swizzle swizzle,
                                                   int base_offset = 0) {
  const uint64_t mode = swizzle == Swizzle::none ? 0 : 4 - static_cast<uint64_t>(swizzle);
  const auto field = [](uint64_t bytes) { return (bytes & 0x3ffff) >> 4; };
  return {field(sim::window_address(tile)) | field(static_cast<uint64_t>(leading)) << 16 |
          field(static_cast<uint64_t>(stride)) << 32 | static_cast<uint64_t>(base_offset & 7) << 49 | mode << 62};
}

template <int count>
__forceinline__ void settle_registers(float (&d)[count]) {
  twin::settle(d, count);
}

__forceinline__ void wgmma_fence(sim::Site site = sim::Site::current()) { sim::wgmma_fence(site); }
template <int count>
__forceinline__ void wgmma_fence(float (&d)[count], sim::Site site = sim::Site::current()) {
  settle_registers(d);
  sim::wgmma_fence(site);
}

__forceinline__ void wgmma_commit(sim::Site site = sim::Site::current()) { sim::wgmma_commit(site); }

template <int pending>
__forceinline__ void wgmma_wait(sim::Site site = sim::Site::current()) {
  sim::wgmma_wait(pending, site);
}
template <int pending, int count>
__forceinline__ void wgmma_wait(float (&d)[count], sim::Site site = sim::Site::current()) {
  sim::wgmma_wait(pending, site);
  settle_registers(d);
}

template <Multiplicand element, Major a_major = Major::k, Major b_major = Major::k, int count>
__forceinline__ void wgmma(float (&d)[count], MatrixDescriptor a, MatrixDescriptor b, bool add,
                           sim::Site site = sim::Site::current()) {
  static_assert(count % 4 == 0 && count >= 4 && count <= 128);
  static_assert(twin::has_sixteen_bits(element) || (a_major == Major::k && b_major == Major::k));
  const sim::WgmmaShape shape{twin::left_of(element), twin::right_of(element), 2 * count, a_major == Major::mn,
                              b_major == Major::mn};
  twin::multiply("wgmma", shape, {d, nullptr, a.bits, b.bits, add, nullptr}, site);
}

template <Multiplicand element, Major b_major = Major::k, int count>
__forceinline__ void wgmma(float (&d)[count], const uint32_t (&a)[4], MatrixDescriptor b, bool add,
                           sim::Site site = sim::Site::current()) {
  static_assert(count % 4 == 0 && count >= 4 && count <= 128);
  static_assert(twin::has_sixteen_bits(element) || b_major == Major::k);
  const sim::WgmmaShape shape{twin::left_of(element), twin::right_of(element), 2 * count, false, b_major == Major::mn};
  twin::multiply("wgmma", shape, {d, a, 0, b.bits, add, nullptr}, site);
}

}  // namespace llmengine::ptx
