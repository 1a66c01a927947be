#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include "common/check.h"

namespace llmengine::cpu {
namespace {

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::generic;
}

Isa choose() {
  Isa best = Isa::generic;
  for (int i = 0; i < kIsaCount; ++i) {
    if (supported(static_cast<Isa>(i))) best = static_cast<Isa>(i);
  }
  const char* forced = std::getenv("LLMENGINE_CPU_ISA");
  if (!forced || !*forced) return best;
  std::string usable;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!supported(isa)) continue;
    if (std::string(forced) == name(isa)) return isa;
    usable += (usable.empty() ? "" : ", ") + std::string(name(isa));
  }
  fail("LLMENGINE_CPU_ISA=" + std::string(forced) + " cannot be used; this machine and build have: " + usable);
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

bool supported(Isa isa) {
#ifndef LLMENGINE_X86_KERNELS
  if (isa != Isa::generic) return false;
#endif
  return processor_has(isa);
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace llmengine::cpu
