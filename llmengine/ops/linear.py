"""Linear layer: schemas, fake kernels, autograd.

Kernels see tokens: ``input`` is (tokens, in), ``weight`` (out, in). Parameters are in input's dtype, or float32 beside
a 16-bit input: products are then taken in input's precision, and gradients come back in each parameter's own dtype. The
weight's may be added to a buffer (optim/main_grad.py).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.backends.buffers import empty_gradients
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define


def _forward_fake(input, weight, bias):
    return input.new_empty((input.shape[0], weight.shape[0]))


def _backward_fake(grad_output, input, weight, main, wanted):
    gradients = (
        (input.shape, input.dtype), (weight.shape, weight.dtype), ((weight.shape[0],), statistics_dtype(input)),
    )  # fmt: skip
    return empty_gradients(input, gradients, wanted, {1: main})


linear_forward = define("linear_forward(Tensor input, Tensor weight, Tensor? bias) -> Tensor", _forward_fake)
# wanted: one flag for each of the three gradients, in their order; the others come back empty, and so does that of the
# weight where there is a buffer for it.
linear_backward = define(
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor(a!)? main, bool[] wanted)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, main):
        ctx.save_for_backward(input, weight)
        ctx.main = main
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear_forward(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        wanted = list(ctx.needs_input_grad[:3])
        grad_input, grad_weight, grad_bias = linear_backward(grad_output, *ctx.saved_tensors, ctx.main, wanted)
        return (
            grad_input if wanted[0] else None,
            grad_weight if wanted[1] and ctx.main is None else None,
            grad_bias.to(ctx.bias_dtype) if wanted[2] else None,
            None,
        )
