"""Layer norm and RMS norm, plain and with a fused residual add and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmengine.functional.arguments import (
    as_rows,
    check_float,
    check_probability,
    check_same_device,
    check_same_dtype,
    draw_seed,
    flat,
    needs_grad,
    parameter_like,
)
from llmengine.ops import norm as ops


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation over the last dimensions (Ba, Kiros & Hinton 2016), as `torch.nn.functional.layer_norm`.

    Shapes: input (*, normalized_shape), weight and bias normalized_shape; the result is like input. Statistics are
    float32. weight and bias may be float32 where input is 16-bit. Raises ValueError on shapes, dtypes or devices that
    do not fit.
    """
    return _norm("layer_norm", input, normalized_shape, weight, bias, eps, subtract_mean=True)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Root-mean-square normalisation (Zhang & Sennrich 2019), as `torch.nn.functional.rms_norm`.

    eps None is the machine epsilon of the accumulation dtype (float32 for 16-bit inputs). Shapes, errors: `layer_norm`.
    """
    return _norm("rms_norm", input, normalized_shape, weight, None, eps, subtract_mean=False)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + dropout(input); returns (layer_norm(new_residual), new_residual), in one pass.

    Shapes: input and residual (*, normalized_shape), equal dtypes. What is normalised is the rounded new_residual.
    """
    return _add_norm("add_layer_norm", input, residual, normalized_shape, weight, bias, eps, dropout_p, True)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `add_layer_norm`, with `rms_norm`."""
    return _add_norm("add_rms_norm", input, residual, normalized_shape, weight, None, eps, dropout_p, False)


def _norm(op, input, normalized_shape, weight, bias, eps, subtract_mean):
    check_float(op, "input", input)
    columns, weight, bias = _check(op, input, None, normalized_shape, weight, bias)
    rows = as_rows(input, columns)
    weight, bias = _flat(weight), _flat(bias)
    eps = _epsilon(op, eps, input)
    if needs_grad(rows, weight, bias):
        output = ops.Norm.apply(rows, weight, bias, eps, subtract_mean)
    else:
        output = ops.norm_forward(rows, None, weight, bias, None, eps, 0.0, subtract_mean)[0]
    return output if rows is input else output.view(input.shape)


def _add_norm(op, input, residual, normalized_shape, weight, bias, eps, dropout_p, subtract_mean):
    check_float(op, "residual", residual)
    if residual.shape != input.shape:
        raise ValueError(
            f"{op}: residual has shape {tuple(residual.shape)} but input has {tuple(input.shape)}; they must be equal"
        )
    check_float(op, "input", input)
    if residual.dtype != input.dtype:
        if not torch.is_autocast_enabled(input.device.type):
            check_same_dtype(op, input=input, residual=residual)
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    columns, weight, bias = _check(op, input, residual, normalized_shape, weight, bias)
    check_probability(op, "dropout_p", dropout_p)
    seed = draw_seed(input.device) if dropout_p > 0 else None
    rows = as_rows(input, columns)
    args = (
        rows, as_rows(residual, columns), _flat(weight), _flat(bias), seed, _epsilon(op, eps, input), float(dropout_p),
        subtract_mean,
    )  # fmt: skip
    run = ops.AddNorm.apply if needs_grad(*args[:4]) else ops.norm_forward
    output, new_residual = run(*args)[:2]
    if rows is not input:
        return output.view(input.shape), new_residual.view(input.shape)
    return output, new_residual


def _check(
    op: str, input: Tensor, residual: Tensor | None, normalized_shape: Sequence[int], weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[int, Tensor | None, Tensor | None]:  # fmt: skip
    """Validates, and returns the number of normalised elements, and the parameters as input's dtype takes them."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(f"{op}: normalized_shape {shape} is not the end of input's shape {tuple(input.shape)}")
    weight, bias = parameter_like(op, "weight", weight, shape, input), parameter_like(op, "bias", bias, shape, input)
    if residual is not None or weight is not None or bias is not None:
        check_same_device(op, input=input, residual=residual, weight=weight, bias=bias)
    columns = math.prod(shape)
    if columns == 0:
        raise ValueError(f"{op}: normalized_shape {shape} has no elements to normalise")
    return columns, weight, bias


def _epsilon(op: str, eps: float | None, input: Tensor) -> float:
    if eps is None:
        return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    return float(eps)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else flat(parameter)
