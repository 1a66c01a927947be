"""The norm of all elements of a list of tensors together: schema and fake kernel. Semantics: csrc/ops/gradient_norm.h.

The tensors of a call have one dtype and device. The norm is float32 (float64 of float64 tensors); it has no gradient.
"""

from __future__ import annotations

import torch

from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define


def _fake(gradients):
    dtype = statistics_dtype(gradients[0]) if gradients else torch.float32
    return torch.empty((), dtype=dtype, device=gradients[0].device if gradients else None)


gradient_norm = define("gradient_norm(Tensor[] gradients) -> Tensor norm", _fake)
