"""Layer norm and RMS norm on the CPU: csrc/cpu/kernels/norm.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _forward_refuses(input, residual, weight, bias, seed, eps, dropout_p, subtract_mean):
    return refuses_tensors(input, residual, weight, bias)


def _backward_refuses(grad_output, grad_new_residual, h, weight, mean, rstd, *_):
    return refuses_tensors(grad_output, grad_new_residual, h, weight, mean, rstd)


@kernel(KERNELS, "norm_forward", _forward_refuses)
def norm_forward(input, residual, weight, bias, seed, eps, dropout_p, subtract_mean):
    rows, columns = input.shape
    output = input.new_empty(rows, columns)
    new_residual = input.new_empty(0) if residual is None else input.new_empty(rows, columns)
    mean = torch.empty(rows if subtract_mean else 0)
    rstd = torch.empty(rows)
    module.norm_forward(
        input=unit_last_stride(input), residual=unit_last_stride(residual), weight=contiguous(weight),
        bias=contiguous(bias), seed=seed, eps=eps, dropout_p=dropout_p, subtract_mean=subtract_mean, output=output,
        new_residual=new_residual if residual is not None else None, mean=mean if subtract_mean else None, rstd=rstd,
    )  # fmt: skip
    return output, new_residual, mean, rstd


@kernel(KERNELS, "norm_backward", _backward_refuses)
def norm_backward(grad_output, grad_new_residual, h, weight, mean, rstd, seed, dropout_p, subtract_mean, split):
    rows, columns = h.shape
    grad_input = h.new_empty(rows, columns)
    grad_residual = h.new_empty(rows, columns) if split else h.new_empty(0)
    grad_weight, grad_bias = torch.empty(columns), torch.empty(columns)
    module.norm_backward(
        grad_output=unit_last_stride(grad_output), grad_new_residual=unit_last_stride(grad_new_residual),
        h=unit_last_stride(h), weight=contiguous(weight), mean=mean if subtract_mean else None, rstd=rstd, seed=seed,
        dropout_p=dropout_p, subtract_mean=subtract_mean, grad_input=grad_input,
        grad_residual=grad_residual if split else None, grad_weight=grad_weight, grad_bias=grad_bias,
    )  # fmt: skip
    return grad_input, grad_residual, grad_weight, grad_bias
