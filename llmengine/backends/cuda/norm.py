"""Layer norm and RMS norm in CUDA: csrc/cuda/norm.cu."""

from __future__ import annotations

import torch

from llmengine.backends.cuda.native import Native, parameter, unit_last_stride
from llmengine.ops.registry import Kernel, kernel


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def forward_refuses(input, residual, weight, bias, seed, eps, dropout_p, subtract_mean):
        return native.refuses_tensors(input, residual, weight, bias, seed)

    def backward_refuses(grad_output, grad_new_residual, h, weight, mean, rstd, seed, *_):
        return native.refuses_tensors(grad_output, grad_new_residual, h, weight, mean, rstd, seed)

    @kernel(table, "norm_forward", forward_refuses)
    def norm_forward(input, residual, weight, bias, seed, eps, dropout_p, subtract_mean):
        output = input.new_empty(input.shape)
        new_residual = input.new_empty(input.shape if residual is not None else (0,))
        mean = input.new_empty(input.shape[0] if subtract_mean else 0, dtype=torch.float32)
        rstd = input.new_empty(input.shape[0], dtype=torch.float32)
        native.call(
            "norm_forward", input, input=unit_last_stride(input), residual=unit_last_stride(residual),
            weight=parameter(weight, input), bias=parameter(bias, input), seed=seed, eps=eps, dropout_p=dropout_p,
            subtract_mean=subtract_mean, output=output, new_residual=new_residual if residual is not None else None,
            mean=mean if subtract_mean else None, rstd=rstd,
        )  # fmt: skip
        return output, new_residual, mean, rstd

    @kernel(table, "norm_backward", backward_refuses)
    def norm_backward(grad_output, grad_new_residual, h, weight, mean, rstd, seed, dropout_p, subtract_mean, split):
        columns = h.shape[1]
        grad_input = h.new_empty(h.shape)
        grad_residual = h.new_empty(h.shape if split else (0,))
        grad_weight, grad_bias = (h.new_empty(columns, dtype=torch.float32) for _ in range(2))
        h = unit_last_stride(h)
        blocks = native.ask("norm_backward_blocks", h, h=h)
        native.call(
            "norm_backward", h, grad_output=unit_last_stride(grad_output),
            grad_new_residual=unit_last_stride(grad_new_residual), h=h, weight=parameter(weight, h),
            mean=mean if subtract_mean else None, rstd=rstd, seed=seed, dropout_p=dropout_p,
            subtract_mean=subtract_mean, grad_input=grad_input, grad_residual=grad_residual if split else None,
            grad_weight=grad_weight, grad_bias=grad_bias,
            partial=h.new_empty((blocks, 2, columns), dtype=torch.float32),
        )  # fmt: skip
        return grad_input, grad_residual, grad_weight, grad_bias

    return table
