// The choice of an instruction set (csrc/cpu/isa.h) on machines that we are not on. Prints what failed; the exit code
// counts it. Built by tests/test_isa.py.
#include "cpu/isa.h"

#include <cstdio>
#include <stdexcept>

using namespace llmengine::cpu;

namespace {

int failures = 0, asked = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED %s\n", what);
  ++failures;
}

template <Isa best>
bool up_to(Isa isa) {
  return isa <= best;
}
template <Isa slow>
bool all_but(Isa isa) {
  return isa != slow;
}
bool all(Isa) { return true; }
std::string grants() {
  ++asked;
  return "";
}
std::string refuses() {
  ++asked;
  return "Operation not permitted";
}

}  // namespace

int main() {
  const Choice granted{Machine{up_to<Isa::amx>, all, grants}};
  expect(granted.best() == Isa::amx && granted.notice.empty(), "granted tiles are used without a word");
  expect(asked == 1, "the system is asked once");

  const Choice refused{Machine{up_to<Isa::amx>, all, refuses}};
  expect(refused.best() == Isa::avx512_bf16, "refused tiles fall back to the next set");
  expect(refused.notice ==
             "the processor has AMX but the system refuses its tiles (Operation not permitted): using avx512_bf16",
         "the refusal is told");
  try {
    refused.forced("amx");
    expect(false, "refused tiles cannot be forced");
  } catch (const std::invalid_argument& error) {
    expect(std::string(error.what()) ==
               "LLMENGINE_CPU_ISA=amx cannot be used; this machine and build have: generic, "
               "avx2, avx512, avx512_rounding, avx512_bf16",
           error.what());
  }
  expect(refused.forced("avx2") == Isa::avx2, "a lower set can be forced");

  asked = 0;
  const Choice older{Machine{up_to<Isa::avx512>, all, refuses}};
  expect(asked == 0 && older.best() == Isa::avx512 && older.notice.empty(), "without AMX nobody is asked");

  const Choice hidden{Machine{up_to<Isa::avx512_bf16>, all_but<Isa::avx512_bf16>, grants}};
  expect(hidden.best() == Isa::avx512_rounding, "what does not pay is not chosen");
  expect(hidden.forced("avx512_bf16") == Isa::avx512_bf16, "but can be forced");
  const Choice tiles{Machine{up_to<Isa::amx>, all_but<Isa::avx512_bf16>, grants}};
  expect(tiles.best() == Isa::amx, "what pays is chosen beyond what does not");

  if (!failures) std::printf("passed\n");
  return failures != 0;
}
