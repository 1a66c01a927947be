"""Linear layer in 8-bit floats: schemas, fake kernels, autograd.

Products are along k of matrices as llmengine/backends/fp8.py has them: what the backward multiplies is kept transposed.
A weight's gradient may be added to a buffer (optim/main_grad.py).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.backends.buffers import empty_gradients
from llmengine.backends.fp8 import lines_of_block, numbers_shape, scales_shape
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define


def _room(like, wanted, lines, k, block):
    numbers, scales = (numbers_shape(lines, k), scales_shape(lines, k, block)) if wanted else ((0,), (0,))
    return like.new_empty(numbers, dtype=torch.uint8), like.new_empty(scales, dtype=torch.float32)


def _weight_fake(weight, scaling, transposed):
    (out, width), block = weight.shape, lines_of_block(scaling, True)
    return *_room(weight, True, out, width, block), *_room(weight, transposed, width, out, block)


def _forward_fake(input, rows, row_scales, bias, scaling, transposed):
    (tokens, width), block = input.shape, lines_of_block(scaling, False)
    return input.new_empty((tokens, rows.shape[0])), *_room(input, transposed, width, tokens, block)


def _backward_fake(
    grad_output, input_columns, input_scales, weight_columns, weight_scales, scaling, grad_format, weight_dtype, main,
    wanted,
):  # fmt: skip
    tokens, out = grad_output.shape
    shapes = ((tokens, weight_columns.shape[0]), (out, input_columns.shape[0]), (out,))
    dtypes = (grad_output.dtype, weight_dtype, statistics_dtype(grad_output))
    return empty_gradients(grad_output, tuple(zip(shapes, dtypes, strict=True)), wanted, {1: main})


# The numbers of a weight (out, in), for the forward, and of its transpose, for the input's gradient, where wanted.
fp8_weight = define(
    "fp8_weight(Tensor weight, str scaling, bool transposed)"
    " -> (Tensor rows, Tensor row_scales, Tensor columns, Tensor column_scales)",
    _weight_fake,
)
# transposed: whether the input's transpose comes along, for the gradient of weight.
fp8_linear_forward = define(
    "fp8_linear_forward(Tensor input, Tensor rows, Tensor row_scales, Tensor? bias, str scaling, bool transposed)"
    " -> (Tensor output, Tensor input_columns, Tensor input_scales)",
    _forward_fake,
)
# wanted: one flag for each of the three gradients, in their order; the others come back empty, and so does that of a
# weight with a buffer.
fp8_linear_backward = define(
    "fp8_linear_backward(Tensor grad_output, Tensor input_columns, Tensor input_scales, Tensor weight_columns,"
    " Tensor weight_scales, str scaling, str grad_format, ScalarType weight_dtype, Tensor(a!)? main, bool[] wanted)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)


class Fp8Linear(torch.autograd.Function):
    """rows to column_scales: fp8_weight's of `weight`, which itself is there for its gradient. main: its buffer."""

    @staticmethod
    def forward(ctx, input, weight, bias, rows, row_scales, columns, column_scales, scaling, grad_format, main):
        output, *saved = fp8_linear_forward(input, rows, row_scales, bias, scaling, ctx.needs_input_grad[1])
        ctx.save_for_backward(*saved, columns, column_scales)
        ctx.options = scaling, grad_format, weight.dtype, main
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        wanted = list(ctx.needs_input_grad[:3])
        grad_input, grad_weight, grad_bias = fp8_linear_backward(grad_output, *ctx.saved_tensors, *ctx.options, wanted)
        return (
            grad_input if wanted[0] else None,
            grad_weight if wanted[1] and ctx.options[-1] is None else None,
            grad_bias.to(ctx.bias_dtype) if wanted[2] else None,
            *(None,) * 7,
        )
