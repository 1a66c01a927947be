// The program image (executable or module) that holds kernels and simulator: its functions and shared variables, from
// its own symbol table, and source lines, from binutils' addr2line where that is installed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llmengine::sim {

// Alone on whole pages: what lies between its end and the next page belongs to nobody.
struct SharedVariable {
  uintptr_t begin, end;
  std::string name;

  uintptr_t pages_end() const { return (end + 4095) & ~uintptr_t{4095}; }
};

class Image {
 public:
  static const Image& own();

  // Every __shared__ variable of the image: what include/cuda_runtime.h makes of it is a static variable of a function
  // that begins a page. Others may by chance, but they have an initial value, or a guard for the making of one.
  const std::vector<SharedVariable>& shared_variables() const { return shared_; }
  const SharedVariable* shared_variable_at(uintptr_t address) const;  // on whose pages the address lies, or null

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

  std::string path_;
  uintptr_t base_ = 0;
  std::vector<Segment> segments_;
  std::vector<SharedVariable> shared_;
  std::vector<Function> functions_;
};

}  // namespace llmengine::sim
