"""The native module `llmengine._cpu` and what all CPU kernels share."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import torch
from torch import Tensor

module: Any
_reason: str | None
try:
    module = importlib.import_module("llmengine._cpu")  # torch is imported first: the two share its OpenMP pool
except ImportError as error:
    module = None
    _reason = f"the native module llmengine._cpu is not built ({error}); run `pip install -e .`"
else:
    module.set_thread_count_source(torch.get_num_threads)
    _reason = None

DTYPES = (torch.float32, torch.bfloat16)


_told = module is None


def unavailable() -> str | None:
    """Asked by the registry at the first call: then it is also told, once, where a processor's AMX is refused."""
    global _told
    if not _told:
        _told = True  # though the warning may be raised as an error
        tell_refusal(module.isa_notice())
    return _reason


def tell_refusal(notice: str) -> None:
    """A warning of it, unless another instruction set was asked for anyway."""
    if notice and not os.environ.get("LLMENGINE_CPU_ISA"):
        warnings.warn(f"llmengine: {notice}", stacklevel=2)


def refuses_tensors(*tensors: Tensor | None) -> str | None:
    """The refusals that all CPU kernels have in common: a device or float dtype that they do not take."""
    for tensor in tensors:
        if tensor is None or (tensor.is_cpu and tensor.dtype in DTYPES):
            continue
        if not tensor.is_cpu:
            return f"the cpu backend takes CPU tensors, got one on {tensor.device}"
        if tensor.is_floating_point():
            return f"the cpu backend takes float32 and bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def unit_last_stride(x: Tensor | None) -> Tensor | None:
    """`x`, or a copy of it where its last dimension is strided (a transposed or expanded tensor)."""
    return x if x is None or x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


# Sizes are given to torch.empty and new_empty one by one: as a tuple they take two microseconds more.


def scalar() -> Tensor:
    """An uninitialised float32 of no dimension."""
    return torch.empty_strided((), ())


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
