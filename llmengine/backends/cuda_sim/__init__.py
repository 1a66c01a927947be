"""The kernels of csrc/cuda in the simulator of csrc/sim, on CPU tensors: for tests, and only where it is demanded.

It runs each CUDA thread by itself and checks every memory access, so it is slow: thousands of elements, not millions.
The module `llmengine._cuda_sim` is built by CMake's LLMENGINE_SIM=ON, and by `llmengine.testing.simulator`.
"""

from __future__ import annotations

from llmengine.backends.cuda.native import Native
from llmengine.backends.cuda.tables import all_kernels
from llmengine.ops.registry import Kernel

__all__ = ["KERNELS", "unavailable"]

NATIVE = Native(
    "llmengine._cuda_sim", "cuda_sim", "cpu", "configure with -DLLMENGINE_SIM=ON, or run tests/sim, which build it"
)
KERNELS: dict[str, Kernel] = all_kernels(NATIVE)


def unavailable() -> str | None:
    return NATIVE.missing()
