"""The norm by which gradients are clipped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llmengine.ops import gradient_norm as ops


@torch.no_grad()
def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of all gradients, as `torch.nn.utils.get_total_norm`.

    gradients: of any shapes, floating dtypes and devices. The result is () on the first one's device, float32 (float64
    where one of them is; PyTorch: rounded to the gradients' dtype), 0 where there are none. Squares are added up in
    float64, in one pass and in a fixed order; no float32 overflows on the way. NaN where an element is NaN, otherwise
    infinite where one is. `AdamW.step(gradient_scale=(limit / norm).clamp(max=1))` clips.
    Raises ValueError for sparse gradients.
    """
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.layout != torch.strided or not gradient.is_floating_point():
            raise ValueError(
                f"gradient_norm: gradients has a {gradient.layout} tensor of {gradient.dtype}; allowed: dense tensors "
                "of floating dtypes"
            )
        lists.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    norms = [ops.gradient_norm(tensors) for tensors in lists.values()]
    if not norms:
        return torch.zeros(())
    if len(norms) == 1:
        return norms[0]
    wide = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]).square().sum().sqrt()
    return wide.to(max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize))
