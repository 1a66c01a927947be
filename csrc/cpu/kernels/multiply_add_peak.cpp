// The innermost product of the CPU kernels at its best (contract: ops/multiply_add_peak.h): A and B of one register
// tile stay in the first-level cache (B: 16 KiB), and C goes to it once per kDepth multiply-adds of each element.
#include "ops/multiply_add_peak.h"

#include "cpu/parallel.h"
#include "cpu/tile_gemm.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int kDepth = 64, kColumns = kTileVectors * kLanes;

void multiply_add_peak(const ops::MultiplyAddPeak& p) {
  const int threads = num_threads();
  parallel_each(threads, [&](int64_t) {
    alignas(64) float a[kTileRows * kDepth], b[kDepth * kColumns], c[kTileRows * kColumns];
    std::fill_n(a, kTileRows * kDepth, 0.5f);
    std::fill_n(b, kDepth * kColumns, 0.25f);
    for (int64_t round = 0; round < p.rounds; ++round) {
      multiply_tile<kTileVectors, Lies::along, Into::place>(kTileRows, kDepth, a, kDepth, b, kColumns, c, kColumns,
                                                            nullptr);
      asm volatile("" ::"r"(c) : "memory");  // C is wanted every time
    }
  });
  p.flops.as<float>()[0] = 2.0f * kTileRows * kDepth * kColumns * static_cast<float>(p.rounds) * threads;
}

const Registrar<ops::MultiplyAddPeak> peak{multiply_add_peak};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
