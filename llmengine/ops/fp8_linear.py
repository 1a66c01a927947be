"""Linear layer in 8-bit floats: schemas, fake kernels, autograd.

Numbers are the bytes (torch.uint8, which opcheck can compare) of torch.float8_e4m3fn or torch.float8_e5m2, in matrices
(lines, k) with k rounded up to a multiple of 16 by zeros. They are multiplied by float32 scales: (1, 1), or one for a
block of 1 or 128 lines and 128 of k, as (k / 128, blocks of lines), both rounded up. Products are along k: what the
backward multiplies is kept transposed.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.ops.registry import define

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALINGS = ("tensor", "block")
ALIGNED, DEPTH = 16, 128  # what k is rounded up to; of k, in a block


def blocks_of(size: int, block: int) -> int:
    return (size + block - 1) // block


def lines_of_block(scaling: str, weight: bool) -> int:
    """0: the whole matrix is one."""
    return 0 if scaling == "tensor" else (128 if weight else 1)


def numbers_shape(lines: int, k: int) -> tuple[int, int]:
    return lines, blocks_of(k, ALIGNED) * ALIGNED


def scales_shape(lines: int, k: int, block: int) -> tuple[int, int]:
    return (1, 1) if block == 0 else (blocks_of(k, DEPTH), blocks_of(lines, block))


def _forward_fake(input, weight, bias, scaling, kept):
    (tokens, width), out = input.shape, weight.shape[0]
    saved = []
    for keep, lines, block in zip(
        kept, (tokens, out), (lines_of_block(scaling, False), lines_of_block(scaling, True)), strict=True
    ):
        shapes = (numbers_shape(width, lines), scales_shape(width, lines, block)) if keep else ((0,), (0,))
        saved += [input.new_empty(s, dtype=d) for s, d in zip(shapes, (torch.uint8, torch.float32), strict=True)]
    return input.new_empty((tokens, out)), *saved


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
