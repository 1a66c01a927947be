"""Layer norm and RMS norm of rows, written out from their formulas (csrc/ops/norm.h)."""

from __future__ import annotations

import torch

from llmengine.backends.reference.philox import keep_multiplier
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x is None or x.dtype == torch.float64 else x.float()


def _keep(h, seed, p):
    rows = torch.arange(h.shape[0], device=h.device)
    return keep_multiplier(seed, p, 0, rows, h.shape[1], h.dtype)


@kernel(KERNELS, "norm_forward")
def norm_forward(input, residual, weight, bias, seed, eps, dropout_p, subtract_mean):
    h = _wide(input)
    if dropout_p > 0:
        h = h * _keep(h, seed, dropout_p)
    new_residual = input.new_empty(0)
    if residual is not None:
        new_residual = (h + _wide(residual)).to(input.dtype)
        h = _wide(new_residual)
    mean = h.mean(1) if subtract_mean else h.new_zeros(h.shape[0])
    centred = h - mean[:, None]
    rstd = (centred.square().mean(1) + eps).rsqrt()
    output = centred * rstd[:, None]
    if weight is not None:
        output = output * _wide(weight)
    if bias is not None:
        output = output + _wide(bias)
    return output.to(input.dtype), new_residual, mean if subtract_mean else mean.new_empty(0), rstd


@kernel(KERNELS, "norm_backward")
def norm_backward(grad_output, grad_new_residual, h, weight, mean, rstd, seed, dropout_p, subtract_mean, split):
    grad, wide_h = _wide(grad_output), _wide(h)
    x = (wide_h - mean[:, None] if subtract_mean else wide_h) * rstd[:, None]
    g = grad if weight is None else grad * _wide(weight)
    grad_h = g - x * (g * x).mean(1, keepdim=True)
    if subtract_mean:
        grad_h = grad_h - g.mean(1, keepdim=True)
    grad_h = grad_h * rstd[:, None]
    if grad_new_residual is not None:
        grad_h = grad_h + _wide(grad_new_residual)
    grad_residual = grad_h.to(h.dtype) if split else h.new_empty(0)
    grad_input = grad_h * _keep(grad_h, seed, dropout_p) if dropout_p > 0 else grad_h
    return grad_input.to(h.dtype), grad_residual, (grad * x).sum(0), grad.sum(0)
