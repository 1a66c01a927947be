"""Layer norm and RMS norm of rows, with an optional residual add and dropout in front: schemas, fake kernels, autograd.

Kernels see rows: ``input`` is (rows, columns). Saved statistics are float32 on every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmengine.ops.registry import Function, define


def _forward_fake(input, residual, weight, bias, seed, eps, dropout_p, subtract_mean):
    rows = input.shape[0]
    statistics = input.new_empty(rows, dtype=statistics_dtype(input))
    return (
        input.new_empty(input.shape),
        input.new_empty(input.shape if residual is not None else (0,)),
        statistics if subtract_mean else statistics.new_empty(0),
        torch.empty_like(statistics),
    )


def _backward_fake(grad_output, grad_new_residual, h, weight, mean, rstd, seed, dropout_p, subtract_mean, split):
    columns = h.shape[1]
    line = h.new_empty(columns, dtype=statistics_dtype(h))
    return h.new_empty(h.shape), h.new_empty(h.shape if split else (0,)), line, torch.empty_like(line)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Statistics and accumulators: float32, or float64 for the float64 oracle."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# residual None: new_residual comes back empty; subtract_mean False is RMS norm, and mean comes back empty.
norm_forward = define(
    "norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps,"
    " float dropout_p, bool subtract_mean) -> (Tensor output, Tensor new_residual, Tensor mean, Tensor rstd)",
    _forward_fake,
)
# split: grad_residual differs from grad_input (dropout lies between them); otherwise it comes back empty.
norm_backward = define(
    "norm_backward(Tensor grad_output, Tensor? grad_new_residual, Tensor h, Tensor? weight, Tensor mean, Tensor rstd,"
    " Tensor? seed, float dropout_p, bool subtract_mean, bool split)"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)


class Norm(Function):
    """norm(input): -> output."""

    @staticmethod
    def forward(ctx, input, weight, bias, eps, subtract_mean):
        output, _, mean, rstd = norm_forward(input, None, weight, bias, None, eps, 0.0, subtract_mean)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.subtract_mean = subtract_mean
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        input, weight, bias, mean, rstd = ctx.saved_tensors
        grad_input, _, grad_weight, grad_bias = norm_backward(
            grad_output, None, input, weight, mean, rstd, None, 0.0, ctx.subtract_mean, False
        )
        return grad_input, _like(grad_weight, weight), _like(grad_bias, bias), None, None


class AddNorm(Function):
    """norm(residual + dropout(input)): -> (output, new_residual)."""

    @staticmethod
    def forward(ctx, input, residual, weight, bias, seed, eps, dropout_p, subtract_mean):
        output, h, mean, rstd = norm_forward(input, residual, weight, bias, seed, eps, dropout_p, subtract_mean)
        ctx.save_for_backward(h, weight, bias, mean, rstd, seed)
        ctx.dropout_p, ctx.subtract_mean = dropout_p, subtract_mean
        ctx.set_materialize_grads(False)
        return output, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_new_residual):
        h, weight, bias, mean, rstd, seed = ctx.saved_tensors
        if grad_output is None:
            if grad_new_residual is None:
                return (None,) * 8
            grad_output = torch.zeros_like(h)
        split = ctx.dropout_p > 0
        grad_input, grad_residual, grad_weight, grad_bias = norm_backward(
            grad_output, grad_new_residual, h, weight, mean, rstd, seed, ctx.dropout_p, ctx.subtract_mean, split
        )
        if not split:
            grad_residual = grad_input
        return grad_input, grad_residual, _like(grad_weight, weight), _like(grad_bias, bias), None, None, None, None


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    if parameter is None:
        return None
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
