"""Softmax of rows: schemas, fake kernels, autograd. Kernels see `input` as (rows, columns)."""

from __future__ import annotations

from torch.autograd.function import once_differentiable

from llmengine.ops.registry import Function, define

softmax_forward = define(
    "softmax_forward(Tensor input, ScalarType dtype) -> Tensor output",
    lambda input, dtype: input.new_empty(input.shape, dtype=dtype),
)
softmax_backward = define(
    "softmax_backward(Tensor grad_output, Tensor output, ScalarType dtype) -> Tensor grad_input",
    lambda grad_output, output, dtype: output.new_empty(output.shape, dtype=dtype),
)


class Softmax(Function):
    """softmax(input), computed in float32 or wider and rounded once to `dtype`."""

    @staticmethod
    def forward(ctx, input, dtype):
        output = softmax_forward(input, dtype)
        ctx.save_for_backward(output)
        ctx.input_dtype = input.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        return softmax_backward(grad_output, output, ctx.input_dtype), None
