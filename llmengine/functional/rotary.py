"""Rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmengine.functional.arguments import check_float, check_same_device, check_tensor, needs_grad, short
from llmengine.ops import rotary as ops


def rotary_embedding(input: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns pairs of each head's features by angles that depend on the token (Su et al. 2021).

    Shapes: input (..., tokens, H, D), of any strides (a slice of a packed projection is read where it lies); the
    result the same, contiguous. cos and sin: of the angles, (tokens, R / 2) with R <= D, float32 (float64 where input
    is); they are constants. The leading R features of a head are turned, the others pass through. Pair k turns by
    angle k and is

        features k and k + R / 2 (Llama, GPT-NeoX), or, where `interleaved`, 2 k and 2 k + 1 (the paper, GPT-J).

    Arithmetic is float32 (float64 for float64) and is rounded once at the end. Raises ValueError where shapes or dtypes
    do not fit.
    """
    op = "rotary_embedding"
    check_float(op, "input", input)
    if input.ndim < 3:
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}; expected (..., tokens, heads, head_dim)")
    tokens, head_dim = input.shape[-3], input.shape[-1]
    wide = torch.promote_types(input.dtype, torch.float32)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table)
        if table.dtype != wide:
            raise ValueError(f"{op}: {name} has dtype {short(table.dtype)}; allowed: {short(wide)}")
        if table.ndim != 2 or table.shape[0] != tokens or table.shape[1] > head_dim // 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(table.shape)}; expected ({tokens}, R / 2) with R at most {head_dim}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: sin has shape {tuple(sin.shape)} but cos has {tuple(cos.shape)}; they must be equal")
    check_same_device(op, input=input, cos=cos, sin=sin)
    batches = input if input.ndim == 4 else input.reshape(math.prod(input.shape[:-3]), *input.shape[-3:])
    if needs_grad(cos, sin):
        cos, sin = cos.detach(), sin.detach()
    turn = ops.Rotary.apply if needs_grad(input) else ops.rotary_forward
    output = turn(batches, cos, sin, interleaved)
    return output if batches is input else output.view(input.shape)
