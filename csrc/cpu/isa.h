// Instruction sets: every kernel file is compiled once per set (see CMakeLists.txt) and the best one that this
// processor has is picked at run time. LLMENGINE_CPU_ISA=generic|avx2|avx512 forces a lower one; forcing one that is
// missing is an error.
#pragma once

namespace llmengine::cpu {

enum class Isa { generic, avx2, avx512 };
inline constexpr int kIsaCount = 3;

const char* name(Isa isa);
bool supported(Isa isa);  // by this processor and by this build
Isa active_isa();         // throws std::invalid_argument where LLMENGINE_CPU_ISA cannot be honoured

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
