"""The kernels of csrc/cuda on one of the modules that have them."""

from __future__ import annotations

from llmengine.backends.cuda import norm, softmax
from llmengine.backends.cuda.native import Native
from llmengine.ops.registry import Kernel


def all_kernels(native: Native) -> dict[str, Kernel]:
    return {**norm.kernels(native), **softmax.kernels(native)}
