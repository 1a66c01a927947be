// Kernels of the long tail: instantiations of templates of csrc/cuda/ that are not built ahead, but compiled when a
// call first asks for them, by NVRTC, from the same sources. Those lie in the module as text, so that structs that host
// and device share have one layout. The compiler, and what it has made so far on the disk, is Python's
// (llmengine/backends/cuda/jit.py); machine code is loaded and launched here (compiled.cuh), by the driver.
//
//   A file with such kernels is read by NVRTC as it is, but for its host's part (#ifndef __CUDACC_RTC__): NVRTC has no
//   standard library, and what it wants of <cstdint> and <cmath> is written in nvrtc.py.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace llmengine::cuda {

struct Instance {
  const char* source;  // a file, as files include it
  std::string kernel;  // with its template's arguments
};

struct MachineCode {
  std::string name;  // the kernel's, in it
  std::string image;
};

// Of an instance, for a compute capability (90 is 9.0); none where it cannot be had. Called by whatever thread
// launches, by several at once, too.
using Compiler = std::function<std::optional<MachineCode>(const Instance&, int capability)>;
void set_compiler(Compiler compiler);

std::map<std::string, std::string> sources();  // what it reads: files by the names that they include one another by
std::vector<std::string> take_launched();      // kernels of the long tail that this thread launched since it last asked

}  // namespace llmengine::cuda
