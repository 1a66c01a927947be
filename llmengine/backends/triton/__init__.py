"""Kernels in Triton, for every GPU that it compiles for; one file per operator."""

from __future__ import annotations

from llmengine.backends.triton.device import unavailable
from llmengine.ops.registry import Kernel

__all__ = ["KERNELS", "unavailable"]

KERNELS: dict[str, Kernel] = {}

if unavailable() is None:
    from llmengine.backends.triton import softmax

    KERNELS |= softmax.KERNELS
