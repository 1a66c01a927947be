"""Linear layer in 8-bit floats: schemas, fake kernels, autograd.

Products are along k of matrices as llmengine/backends/fp8.py has them: what the backward multiplies is kept transposed.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.backends.fp8 import lines_of_block, numbers_shape, scales_shape
from llmengine.ops.registry import define


def _forward_fake(input, weight, bias, scaling, kept):
    (tokens, width), out = input.shape, weight.shape[0]

    def saved(keep, lines, block):
        numbers, scales = (numbers_shape(width, lines), scales_shape(width, lines, block)) if keep else ((0,), (0,))
        return input.new_empty(numbers, dtype=torch.uint8), input.new_empty(scales, dtype=torch.float32)

    return (
        input.new_empty((tokens, out)),
        *saved(kept[0], tokens, lines_of_block(scaling, False)),
        *saved(kept[1], out, lines_of_block(scaling, True)),
    )


def _backward_fake(
    grad_output, input_columns, input_scales, weight_columns, weight_scales, scaling, grad_format, weight_dtype, wanted
):  # fmt: skip
    tokens, out = grad_output.shape
    gradients = (
        (lambda: (tokens, weight_columns.shape[0]), grad_output.dtype),
        (lambda: (out, input_columns.shape[0]), weight_dtype),
        (lambda: (out,), torch.float64 if grad_output.dtype == torch.float64 else torch.float32),
    )  # fmt: skip
    return tuple(
        grad_output.new_empty(shape() if want else (0,), dtype=dtype)
        for (shape, dtype), want in zip(gradients, wanted, strict=True)
    )


# kept: whether the transposes of input and of weight come along, for the gradients of weight and of input.
fp8_linear_forward = define(
    "fp8_linear_forward(Tensor input, Tensor weight, Tensor? bias, str scaling, bool[] kept) -> (Tensor output,"
    " Tensor input_columns, Tensor input_scales, Tensor weight_columns, Tensor weight_scales)",
    _forward_fake,
)
# wanted: one flag for each of the three gradients, in their order; the others come back empty.
fp8_linear_backward = define(
    "fp8_linear_backward(Tensor grad_output, Tensor input_columns, Tensor input_scales, Tensor weight_columns,"
    " Tensor weight_scales, str scaling, str grad_format, ScalarType weight_dtype, bool[] wanted)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)


class Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, scaling, grad_format):
        kept = [ctx.needs_input_grad[1], ctx.needs_input_grad[0]]
        output, *saved = fp8_linear_forward(input, weight, bias, scaling, kept)
        ctx.save_for_backward(*saved)
        ctx.options = scaling, grad_format, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        wanted = list(ctx.needs_input_grad[:3])
        grad_input, grad_weight, grad_bias = fp8_linear_backward(grad_output, *ctx.saved_tensors, *ctx.options, wanted)
        return (
            grad_input if wanted[0] else None,
            grad_weight if wanted[1] else None,
            grad_bias.to(ctx.bias_dtype) if wanted[2] else None,
            None,
            None,
        )
