"""The norm of a list of tensors, written out from its formula (csrc/ops/gradient_norm.h)."""

from __future__ import annotations

import torch

from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@kernel(KERNELS, "gradient_norm")
def gradient_norm(gradients):
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device if gradients else None)
    for gradient in gradients:
        total += gradient.double().square().sum()
    return total.sqrt().to(torch.float64 if gradients and gradients[0].dtype == torch.float64 else torch.float32)
