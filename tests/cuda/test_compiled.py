"""What is asked of the driver: launches of kernels that are compiled at run time (csrc/cuda/compiled.cu), and tensor
maps (csrc/cuda/ptx/tensor_map.cuh). It is one of a few lines that, as the real one does, wants a context bound to the
thread: only functions of the runtime bind the device's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llmengine.testing import resources

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(resources.nvcc() is None, reason="needs nvcc, which finds CUDA's headers")

# A runtime whose driver is found_by() name.
RUNTIME = r"""
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <thread>

thread_local bool bound = false;
void* found_by(const char* name);

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return bound = true, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* state) {
#else
cudaError_t cudaGetDriverEntryPoint(const char* name, void** found, unsigned long long,
                                    cudaDriverEntryPointQueryResult* state) {
#endif
  *found = found_by(name);
  *state = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
"""

LAUNCHES = r"""
#include "cuda/compiled.cuh"

namespace {

CUresult answer = CUDA_SUCCESS;  // of launches
int launches = 0;

CUresult in_context() { return bound ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }
CUresult load(CUlibrary*, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**, unsigned) {
  return in_context();
}
CUresult get(CUkernel* kernel, CUlibrary, const char*) {
  *kernel = reinterpret_cast<CUkernel>(&launches);
  return in_context();
}
CUresult set(CUfunction_attribute, int, CUkernel, CUdevice) { return in_context(); }
CUresult launch(const CUlaunchConfig*, CUfunction, void**, void**) {
  ++launches;
  return bound ? answer : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult text(CUresult, const char** to) { return *to = "invalid argument", CUDA_SUCCESS; }

}  // namespace

void* found_by(const char* name) {
  const auto is = [&](const char* other) { return !std::strcmp(name, other); };
  return is("cuLibraryLoadData")      ? reinterpret_cast<void*>(load)
         : is("cuLibraryGetKernel")   ? reinterpret_cast<void*>(get)
         : is("cuKernelSetAttribute") ? reinterpret_cast<void*>(set)
         : is("cuLaunchKernelEx")     ? reinterpret_cast<void*>(launch)
         : is("cuGetErrorString")     ? reinterpret_cast<void*>(text)
                                      : nullptr;
}

namespace llmengine::cuda {
int compute_capability() { return 90; }
}

using namespace llmengine;

void attempt(const char* what, const cuda::LaunchSite& site, const char* kernel = "f<80>") {
  try {
    const bool done = cuda::launch_instance(site, {"f.cu", kernel}, nullptr);
    std::printf("%s: %s, told of %zu\n", what, done ? "done" : "not had", cuda::take_launched().size());
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", what, error.what());
  }
}

int main() {
  TensorView x;
  x.dtype = DType::bf16, x.ndim = 2, x.sizes[0] = 3, x.sizes[1] = 96;
  const cuda::LaunchSite site{"f", dim3(1), dim3(128), nullptr, x, 64 << 10};
  cuda::LaunchSite empty = site, together = site;
  empty.grid.x = 0, together.cluster.x = 2;
  attempt("no compiler", site, "f<96>");
  cuda::set_compiler([](const cuda::Instance&, int) { return std::optional(cuda::MachineCode{"_Zf", "code"}); });
  attempt("what could not be had", site, "f<96>");
  std::thread([&] { attempt("a fresh thread", site); }).join();
  std::thread([&] { attempt("another one", site); }).join();
  attempt("an empty grid", empty);
  attempt("a cluster", together);
  answer = CUDA_ERROR_INVALID_VALUE;
  attempt("an error", site);
  std::printf("%d launches\n", launches);
}
"""

FOUND = """\
no compiler: not had, told of 0
what could not be had: not had, told of 0
a fresh thread: done, told of 1
another one: done, told of 1
an empty grid: done, told of 0
a cluster: f<80> of bfloat16 (3, 96): kernels compiled at run time have no clusters (grid (1, 1, 1), block (128, 1, 1),\
 cluster (2, 1, 1), 65536 bytes of dynamic shared memory)
an error: f<80> of bfloat16 (3, 96): cuLaunchKernelEx: error 1, invalid argument; LLMENGINE_CUDA_JIT=0 does without\
 kernels compiled at run time (grid (1, 1, 1), block (128, 1, 1), 65536 bytes of dynamic shared memory)
3 launches
"""


MAPS = r"""
#include "cuda/ptx/tensor_map.cuh"

CUresult encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return bound ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
void* found_by(const char*) { return reinterpret_cast<void*>(encode); }

using namespace llmengine;

void attempt(const char* what) {
  TensorView x;
  x.dtype = DType::bf16, x.ndim = 2, x.sizes[0] = 3, x.sizes[1] = 64, x.strides[0] = 64, x.strides[1] = 1;
  try {
    ptx::encode_tensor_map(tensor_map_fields("x", x, {64, 64}, Swizzle::bytes_128));
    std::printf("%s: done\n", what);
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", what, error.what());
  }
}

int main() {
  std::thread([&] { attempt("a fresh thread"); }).join();
  std::thread([&] { attempt("another one"); }).join();
}
"""


def said_by(program: str, folder: Path, *sources: Path) -> str:
    source = folder / "driver.cpp"
    source.write_text(RUNTIME + program)
    built = source.with_suffix("")
    options = ["-std=c++20", "-O1", "-cudart", "none", "-x", "c++", f"-I{ROOT / 'csrc'}"]
    subprocess.run([resources.nvcc(), *options, source, *sources, "-o", built], check=True)
    return subprocess.run([built], check=True, capture_output=True, text=True, timeout=60).stdout


def test_threads_without_a_context_and_errors_with_words(tmp_path: Path):
    assert said_by(LAUNCHES, tmp_path, ROOT / "csrc/cuda/compiled.cu") == FOUND


def test_threads_without_a_context_make_tensor_maps(tmp_path: Path):
    """As autograd's do whose first call is a product or attention on Hopper."""
    assert said_by(MAPS, tmp_path) == "a fresh thread: done\nanother one: done\n"
