// Instruction sets: every kernel file is compiled once per set that it profits from (see CMakeLists.txt), and the best
// one for this processor is picked at run time. LLMENGINE_CPU_ISA=generic|avx2|avx512|avx512_rounding|avx512_bf16|amx
// forces another one; forcing one that is missing is an error.
//
// AVX512-BF16 is two sets: avx512_rounding rounds to bf16 by its instruction, avx512_bf16 multiplies by it, too.
// Intel's cores that have AMX take two cycles for a vdpbf16ps, in which they do four multiply-adds of floats: where
// tiles are denied to them (a virtual machine may do so), bf16 is best widened and multiplied as floats.
#pragma once

#include <string>

namespace llmengine::cpu {

enum class Isa { generic, avx2, avx512, avx512_rounding, avx512_bf16, amx };
inline constexpr int kIsaCount = 6;

const char* name(Isa isa);
bool supported(Isa isa);   // by this processor, this system and this build
Isa active_isa();          // throws std::invalid_argument where LLMENGINE_CPU_ISA cannot be honoured
std::string isa_notice();  // why a set that the processor has is not used, or nothing

// What the choice is made from, so that tests can make it for machines that they do not run on.
struct Machine {
  bool (*has)(Isa);                // the processor and the build
  bool (*pays)(Isa);               // is not slower there than the sets below it
  std::string (*ask_for_tiles)();  // AMX's registers are the system's to grant: why it refuses, or nothing
};
struct Choice {
  bool supported[kIsaCount], pays[kIsaCount];
  std::string notice;

  explicit Choice(const Machine& machine);
  Isa best() const;
  Isa forced(const std::string& name) const;  // throws as active_isa()
};

// The kernels for one Params type, one per instruction set. A kernel file ends with
//   const Registrar<ops::NormForward> forward{norm_forward};
template <class Params>
using Kernel = void (*)(const Params&);

template <class Params>
struct KernelTable {
  static inline Kernel<Params> entries[kIsaCount] = {};
};

template <class Params>
void run(const Params& params) {
  for (int isa = static_cast<int>(active_isa()); isa >= 0; --isa) {
    if (Kernel<Params> kernel = KernelTable<Params>::entries[isa]) return kernel(params);
  }
}

#ifdef LLMENGINE_ISA  // set by the build for kernel files
namespace LLMENGINE_ISA {
template <class Params>
struct Registrar {
  explicit Registrar(Kernel<Params> kernel) {
    KernelTable<Params>::entries[static_cast<int>(Isa::LLMENGINE_ISA)] = kernel;
  }
};
}  // namespace LLMENGINE_ISA
#endif

}  // namespace llmengine::cpu
