"""Softmax along one dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.functional.arguments import FLOATS, check_float, check_tensor, needs_grad, short
from llmengine.ops import softmax as ops


def softmax(input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum(exp(input)) along `dim`, as `torch.nn.functional.softmax`.

    Shapes: input any, the result the same, contiguous. dtype: that of the result; None is input's, or float32 under
    torch.autocast, as PyTorch has it. Arithmetic is float32 (float64 for float64) and is rounded once at the end.
    A row of -inf alone is a fully masked one: it gives zeros and zero gradients (PyTorch gives NaN). A row with NaN or
    +inf gives NaN. Along another dimension than the last, input is copied.
    Raises IndexError where input has no dimension `dim`, ValueError on dtypes that are not floating.
    """
    check_tensor("softmax", "input", input)
    if dtype is None:
        autocast = torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64
        dtype = torch.float32 if autocast else input.dtype
    elif dtype not in FLOATS:
        raise ValueError(f"softmax: dtype is {short(dtype)}; allowed: {', '.join(map(short, FLOATS))}")
    elif not input.is_floating_point():
        input = input.to(dtype)
    check_float("softmax", "input", input)
    ndim = max(input.ndim, 1)
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"softmax: dim is {dim}; allowed for input of shape {tuple(input.shape)}: {-ndim} to {ndim - 1}"
        )
    if input.numel() == 0:
        return input.to(dtype, copy=True)
    last = input if dim in (-1, ndim - 1) else input.movedim(dim, -1)
    rows = last if last.ndim == 2 else last.reshape(-1, last.shape[-1] if last.ndim else 1)
    output = ops.Softmax.apply(rows, dtype) if needs_grad(rows) else ops.softmax_forward(rows, dtype)
    if rows is not last:
        output = output.view(last.shape)
    return output if last is input else output.movedim(-1, dim).contiguous()
