"""CUDA C++ kernels for NVIDIA GPUs (csrc/cuda): float32, bfloat16, float16; sm_80 and later."""

from __future__ import annotations

from llmengine.backends.cuda.jit import Compiler
from llmengine.backends.cuda.native import Native
from llmengine.backends.cuda.tables import all_kernels
from llmengine.ops.registry import Kernel

__all__ = ["KERNELS", "unavailable"]

NATIVE = Native(
    "llmengine._cuda", "cuda", "cuda", "it is built where nvcc and a GPU are found, or with LLMENGINE_CUDA=1 or wheels"
)
KERNELS: dict[str, Kernel] = all_kernels(NATIVE)


def unavailable() -> str | None:
    if reason := NATIVE.missing() or NATIVE.module.device_problem():
        return reason
    NATIVE.module.set_compiler(Compiler(NATIVE.module.sources()))
    return None
