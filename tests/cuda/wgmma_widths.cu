// Every width of a warpgroup's product, with a in shared memory and in registers: for test_ptx.py to compile.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace llmengine {

template <int n>
__global__ void width(float* out) {
  const auto tile = ptx::matrix_descriptor(ptx::dynamic_shared_1024(), 16, 1024, Swizzle::bytes_128);
  const uint32_t a[4] = {threadIdx.x, 1, 2, 3};
  float d[n / 2] = {};
  ptx::wgmma_fence(d);
  ptx::wgmma<ptx::Multiplicand::bf16>(d, tile, tile, true);
  ptx::wgmma<ptx::Multiplicand::f16>(d, a, tile, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  for (int i = 0; i < n / 2; ++i) out[threadIdx.x * (n / 2) + i] = d[i];
}

template <int... eighths>
void all(float* out) {
  (width<8 * eighths><<<1, 128>>>(out), ...);
}

template void all<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
                  29, 30, 31, 32>(float*);

}  // namespace llmengine
