"""The norm of a list of tensors on the CPU: csrc/cpu/kernels/gradient_norm.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.native import module, refuses_tensors
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _refuses(gradients):
    return refuses_tensors(*gradients[:1])  # the first stands for all: the kernel checks the rest


@kernel(KERNELS, "gradient_norm", _refuses)
def gradient_norm(gradients):
    norm = torch.empty((), dtype=torch.float32)
    module.gradient_norm(gradients=[g.contiguous() for g in gradients], norm=norm)
    return norm
