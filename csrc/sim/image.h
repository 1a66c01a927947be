// The program image (executable or module) that holds kernels and simulator: its functions and shared variables, from
// its own symbol table, and source lines, from binutils' addr2line where that is installed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sim/simulator.h"

namespace llmengine::sim {

// What lies between its end and that of its room (kSharedRoom) belongs to nobody.
struct SharedVariable {
  uintptr_t begin, end;
  std::string name, function;  // mangled: the function that declares it, and what else the name has
};

class Image {
 public:
  static const Image& own();

  // Every __shared__ variable of the image: what include/cuda_runtime.h makes of it is a static variable of a function
  // that begins a room of its own. Others may by chance: but the simulator's are known by their namespace, those of
  // libraries by theirs, and those of kernels' hosts have an initial value, or a guard for the making of one.
  const std::vector<SharedVariable>& shared_variables() const { return shared_; }
  const SharedVariable* shared_variable_at(uintptr_t address) const;  // in whose room the address lies, or null
  // Of the variables that a kernel itself declares; those of functions that it calls are not known to be its own.
  size_t static_shared_bytes(uintptr_t kernel) const;

  std::string function_name(uintptr_t address) const;       // without arguments and namespaces
  bool is_constant(uintptr_t address) const;                // in a segment that is never written
  std::string source_line(uintptr_t return_address) const;  // "norm.cu:120", or "module+0x1234"

 private:
  struct Function {
    uintptr_t begin;
    std::string mangled;
  };
  struct Segment {
    uintptr_t begin, end;
    bool writable;
  };

  Image();
  void read_symbols();
  const Function* function_at(uintptr_t address) const;

  std::string path_;
  uintptr_t base_ = 0;
  std::vector<Segment> segments_;
  std::vector<SharedVariable> shared_;
  std::vector<Function> functions_;
};

}  // namespace llmengine::sim
