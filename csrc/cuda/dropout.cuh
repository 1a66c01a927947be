// Dropout multipliers in registers: 0 where the generator of ops/philox.h drops, 1 / (1 - p) elsewhere.
#pragma once

#include <cuda_runtime.h>

#include "ops/philox.h"
#ifndef __CUDACC_RTC__
#include "common/tensor.h"
#endif

namespace llmengine::cuda {

struct Dropout {
  const int64_t* seed = nullptr;  // on the device; null: nothing is dropped
  uint32_t threshold = 0;
  float keep_scale = 1.0f;
};

#ifndef __CUDACC_RTC__
inline Dropout dropout_of(double p, const TensorView& seed) {
  if (p <= 0) return {};
  return {seed.as<int64_t>(), ops::drop_threshold(p), static_cast<float>(1.0 / (1.0 - p))};
}
#endif

// Multiplies n elements of a row from `column` on, a multiple of 4.
template <int n>
__device__ __forceinline__ void drop(const Dropout& dropout, uint64_t seed, int64_t row, int column, float (&x)[n]) {
  static_assert(n % 4 == 0);
#pragma unroll
  for (int first = 0; first < n; first += 4) {
    const ops::Philox4 draws = ops::philox(seed, static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), 0,
                                           static_cast<uint32_t>(row), static_cast<uint32_t>(column + first) / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[first + i] *= draws.word[i] < dropout.threshold ? 0.0f : dropout.keep_scale;
  }
}

}  // namespace llmengine::cuda
