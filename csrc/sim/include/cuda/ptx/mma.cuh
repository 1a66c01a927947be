// Twin of csrc/cuda/ptx/mma.cuh. How sums are rounded stands in csrc/sim/matrix.h.
#pragma once

#include <cuda_runtime.h>

#include "sim/matrix.h"

namespace llmengine::ptx {

namespace twin {

template <sim::Element element, int k>
[[gnu::noinline, gnu::no_sanitize("thread")]] sim::MmaLane product(const char* operation, sim::MmaLane lane,
                                                                   sim::Site site) {
  sim::multiply_matrices(operation, element, k, lane, site);
  return lane;
}

template <sim::Element element, int k, int n_a, int n_b>
__forceinline__ void multiply(const char* operation, float (&d)[4], const uint32_t (&a)[n_a], const uint32_t (&b)[n_b],
                              sim::Site site) {
  sim::MmaLane lane{};
  for (int i = 0; i < 4; ++i) lane.d[i] = d[i];
  for (int i = 0; i < n_a; ++i) lane.a[i] = a[i];
  for (int i = 0; i < n_b; ++i) lane.b[i] = b[i];
  const sim::MmaLane done = product<element, k>(operation, lane, site);
  for (int i = 0; i < 4; ++i) d[i] = done.d[i];
}

}  // namespace twin

__forceinline__ void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      sim::Site site = sim::Site::current()) {
  twin::multiply<sim::Element::bf16, 16>("mma_16x8x16_bf16", d, a, b, site);
}
__forceinline__ void mma_16x8x16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     sim::Site site = sim::Site::current()) {
  twin::multiply<sim::Element::f16, 16>("mma_16x8x16_f16", d, a, b, site);
}
__forceinline__ void mma_16x8x8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                                     sim::Site site = sim::Site::current()) {
  twin::multiply<sim::Element::bf16, 8>("mma_16x8x8_bf16", d, a, b, site);
}
__forceinline__ void mma_16x8x8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                                    sim::Site site = sim::Site::current()) {
  twin::multiply<sim::Element::f16, 8>("mma_16x8x8_f16", d, a, b, site);
}
__forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     sim::Site site = sim::Site::current()) {
  twin::multiply<sim::Element::tf32, 8>("mma_16x8x8_tf32", d, a, b, site);
}

// The lower bits, which are not specified, hold something: who takes the word for a float errs.
__forceinline__ uint32_t tf32_of(float value) {
  if (std::isnan(value)) return 0x7fffffff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return ((bits + 0x1000) & 0xffffe000) | (bits * 0x9e3779b1u) >> 19;
}

}  // namespace llmengine::ptx
