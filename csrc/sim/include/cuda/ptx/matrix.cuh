// Twin of csrc/cuda/ptx/matrix.cuh.
#pragma once

#include <cuda_runtime.h>

#include "sim/matrix.h"

namespace llmengine::ptx {

namespace twin {

template <int count, bool transposed>
[[gnu::noinline, gnu::no_sanitize("thread")]] sim::MatrixLane load_matrices(const char* operation, const void* row,
                                                                            sim::Site site) {
  sim::MatrixLane lane{const_cast<void*>(row), __builtin_return_address(0), {}};
  sim::load_matrices(operation, count, transposed, lane, site);
  return lane;
}

template <bool transposed, int count>
__forceinline__ void load(const char* operation, uint32_t (&r)[count], const void* row, sim::Site site) {
  const sim::MatrixLane lane = load_matrices<count, transposed>(operation, row, site);
  for (int m = 0; m < count; ++m) r[m] = lane.r[m];
}

template <int count, bool transposed>
[[gnu::noinline, gnu::no_sanitize("thread")]] void store_matrices(const char* operation, sim::MatrixLane lane,
                                                                  sim::Site site) {
  lane.return_address = __builtin_return_address(0);
  sim::store_matrices(operation, count, transposed, lane, site);
}

template <bool transposed, int count>
__forceinline__ void store(const char* operation, void* row, const uint32_t (&r)[count], sim::Site site) {
  sim::MatrixLane lane{row, nullptr, {}};
  for (int m = 0; m < count; ++m) lane.r[m] = r[m];
  store_matrices<count, transposed>(operation, lane, site);
}

}  // namespace twin

__forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row, sim::Site site = sim::Site::current()) {
  twin::load<false>("load_matrix_x4", r, row, site);
}
__forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row,
                                               sim::Site site = sim::Site::current()) {
  twin::load<true>("load_matrix_x4_transposed", r, row, site);
}
__forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row, sim::Site site = sim::Site::current()) {
  twin::load<false>("load_matrix_x2", r, row, site);
}
__forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row,
                                               sim::Site site = sim::Site::current()) {
  twin::load<true>("load_matrix_x2_transposed", r, row, site);
}
__forceinline__ void load_matrix_x1(uint32_t (&r)[1], const void* row, sim::Site site = sim::Site::current()) {
  twin::load<false>("load_matrix_x1", r, row, site);
}
__forceinline__ void load_matrix_x1_transposed(uint32_t (&r)[1], const void* row,
                                               sim::Site site = sim::Site::current()) {
  twin::load<true>("load_matrix_x1_transposed", r, row, site);
}

__forceinline__ void store_matrix_x4(void* row, const uint32_t (&r)[4], sim::Site site = sim::Site::current()) {
  twin::store<false>("store_matrix_x4", row, r, site);
}
__forceinline__ void store_matrix_x4_transposed(void* row, const uint32_t (&r)[4],
                                                sim::Site site = sim::Site::current()) {
  twin::store<true>("store_matrix_x4_transposed", row, r, site);
}
__forceinline__ void store_matrix_x2(void* row, const uint32_t (&r)[2], sim::Site site = sim::Site::current()) {
  twin::store<false>("store_matrix_x2", row, r, site);
}
__forceinline__ void store_matrix_x2_transposed(void* row, const uint32_t (&r)[2],
                                                sim::Site site = sim::Site::current()) {
  twin::store<true>("store_matrix_x2_transposed", row, r, site);
}

}  // namespace llmengine::ptx
