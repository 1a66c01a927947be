#include "cpu/isa.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "common/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmengine::cpu {
namespace {

#if defined(__x86_64__)

// A bit of leaf 7 of cpuid, which the builtin of older compilers does not know by name.
bool leaf_7(unsigned subleaf, unsigned (*word)(unsigned eax, unsigned edx), int bit) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx) && (word(eax, edx) >> bit & 1);
}

// Where the system saves AMX's configuration and data when it switches threads.
__attribute__((target("xsave"))) bool saves_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool osxsave = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 27 & 1);
  return osxsave && (_xgetbv(0) >> 17 & 3) == 3;
}

bool processor_has(Isa isa) {
  __builtin_cpu_init();
  const auto first = [](unsigned eax, unsigned) { return eax; };
  const auto last = [](unsigned, unsigned edx) { return edx; };
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return processor_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::avx512_rounding:
    case Isa::avx512_bf16: return processor_has(Isa::avx512) && leaf_7(1, first, 5);
    case Isa::amx:
      return processor_has(Isa::avx512_bf16) && leaf_7(0, last, 24) && leaf_7(0, last, 22) && saves_tiles();
  }
  return false;
}

// Intel's cores with AMX, which a system may hide, are those with AVX512-FP16.
bool processor_is_quicker_by(Isa isa) {
  const auto last = [](unsigned, unsigned edx) { return edx; };
  return isa != Isa::avx512_bf16 || !(__builtin_cpu_is("intel") && leaf_7(0, last, 23));
}

#else

bool processor_has(Isa isa) { return isa == Isa::generic; }
bool processor_is_quicker_by(Isa) { return true; }

#endif

bool machine_has(Isa isa) {
#ifndef LLMENGINE_X86_KERNELS
  if (isa != Isa::generic) return false;
#endif
#ifdef LLMENGINE_AMX_EMULATED
  if (isa == Isa::amx) return true;
#endif
  return processor_has(isa);
}

// Linux gives a process the 8 KiB of tile registers only where it asks, once, before the first tile instruction.
std::string ask_for_tiles() {
#if defined(LLMENGINE_AMX_EMULATED)
  return "";
#elif defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("arch_prctl(ARCH_REQ_XCOMP_PERM) says: ") + std::strerror(errno);
#else
  return "only Linux is known to grant them";
#endif
}

const Choice& choice() {
  static const Choice made{Machine{machine_has, processor_is_quicker_by, ask_for_tiles}};
  return made;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_rounding: return "avx512_rounding";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
  }
  return "unknown";
}

Choice::Choice(const Machine& machine) {
  for (int i = 0; i < kIsaCount; ++i) {
    supported[i] = machine.has(static_cast<Isa>(i)), pays[i] = machine.pays(static_cast<Isa>(i));
  }
  bool& amx = supported[static_cast<int>(Isa::amx)];
  if (!amx) return;
  const std::string refusal = machine.ask_for_tiles();
  if (refusal.empty()) return;
  amx = false;
  notice =
      std::string("the processor has AMX but the system refuses its tiles (") + refusal + "): using " + name(best());
}

Isa Choice::best() const {
  Isa best = Isa::generic;
  for (int i = 0; i < kIsaCount; ++i) {
    if (supported[i] && pays[i]) best = static_cast<Isa>(i);
  }
  return best;
}

Isa Choice::forced(const std::string& wanted) const {
  std::string usable;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!supported[i]) continue;
    if (wanted == name(isa)) return isa;
    usable += (usable.empty() ? "" : ", ") + std::string(name(isa));
  }
  fail("LLMENGINE_CPU_ISA=" + wanted + " cannot be used; this machine and build have: " + usable);
}

bool supported(Isa isa) { return choice().supported[static_cast<int>(isa)]; }
std::string isa_notice() { return choice().notice; }

Isa active_isa() {
  static const Isa isa = [] {
    const char* wanted = std::getenv("LLMENGINE_CPU_ISA");
    return wanted && *wanted ? choice().forced(wanted) : choice().best();
  }();
  return isa;
}

}  // namespace llmengine::cpu
