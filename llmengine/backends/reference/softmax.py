"""Softmax of rows, written out from its formula (csrc/ops/softmax.h)."""

from __future__ import annotations

import torch

from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


@kernel(KERNELS, "softmax_forward")
def softmax_forward(input, dtype):
    wide = _wide(input.to(dtype) if dtype == torch.float64 else input)
    if wide.numel() == 0:
        return wide.to(dtype, copy=True)
    largest = wide.amax(1, keepdim=True)
    shift = torch.where(largest == -torch.inf, 0.0, largest)  # a row of -inf alone: its exponentials are all 0
    e = (wide - shift).exp()
    total = e.sum(1, keepdim=True)
    return torch.where(total == 0, 0.0, e / total).to(dtype)


@kernel(KERNELS, "softmax_backward")
def softmax_backward(grad_output, output, dtype):
    g, y = _wide(grad_output), _wide(output)
    return ((g - (g * y).sum(1, keepdim=True)) * y).to(dtype)
