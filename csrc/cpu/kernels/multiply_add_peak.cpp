// The innermost product of the CPU kernels at its best (contract: ops/multiply_add_peak.h): A and B of one register
// tile stay in the first-level cache (B: 16 KiB), and C goes to it once per kDepth multiply-adds of each element.
#include "ops/multiply_add_peak.h"

#include <algorithm>

#include "cpu/pair_tile.h"
#include "cpu/parallel.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kDepth = 64;

// Calls product() `rounds` times on every thread; `multiply_adds` of one call.
template <class T, class Product>
double repeated(int64_t rounds, int rows, int columns, const Product& product) {
  const int threads = num_threads();
  parallel_each(threads, [&](int64_t) {
    alignas(64) T a[std::max(kStripeRows, kTallRows) * kDepth * 2], b[2 * kDepth * kTileVectors * kLanes];
    alignas(64) float c[std::max(kStripeRows, kTallRows) * kTileVectors * kLanes];
    for (T& x : a) narrow(0.5f, &x);
    for (T& x : b) narrow(0.25f, &x);
    const PairSession session;
    for (int64_t round = 0; round < rounds; ++round) {
      product(a, b, c);
      asm volatile("" ::"r"(c) : "memory");  // C is wanted every time
    }
  });
  return 2.0 * static_cast<double>(rounds) * threads * rows * columns;
}

void multiply_add_peak(const ops::MultiplyAddPeak& p) {
  double& flops = *p.flops.as<double>();
  if (p.unit.dtype == DType::bf16 && kPairsPay) {
    constexpr int64_t depth = 2 * kDepth;
    flops = depth * repeated<bf16>(p.rounds, kStripeRows, kPairPanel, [](const bf16* a, const bf16* b, float* c) {
              multiply_stripe<Into::place>(kPairVectors, kStripeRows, depth, a, depth, b, c, kPairPanel, nullptr);
            });
  } else {
    flops = kDepth * repeated<float>(p.rounds, kTallRows, kPanel, [](const float* a, const float* b, float* c) {
              multiply_tile<kTallRows, kPanelVectors, Lies::along, Into::place>(kTallRows, kDepth, a, kDepth, b, kPanel,
                                                                                c, kPanel, nullptr);
            });
  }
}

const Registrar<ops::MultiplyAddPeak> peak{multiply_add_peak};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
