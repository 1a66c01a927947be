"""Linear layer in 8-bit floats: numbers are rounded as on every backend, and multiplied in float32 or float64."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import added
from llmengine.backends.fp8 import ALIGNED, DEPTH, FORMATS, lines_of_block
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

LEAST = 2.0**-110  # of a scale's largest magnitude: neither the scale nor its inverse leaves float32's normal numbers


def quantise(x, format, block):
    """Numbers (lines, k, rounded up) and scales of x (lines, k); as llmengine.backends.fp8 has them.

    With m the largest finite magnitude of a block, scale = m / most and number = x (most / m), to nearest even and at
    most `most`, where `most` is the format's largest number; all in float32, each operation rounded once.
    """
    (lines, k), x = x.shape, x.float()
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    if block == 0:
        largest = magnitude.amax().view(1, 1) if x.numel() else magnitude.new_zeros(1, 1)
    else:
        padded = torch.nn.functional.pad(magnitude, (0, -k % DEPTH, 0, -lines % block))
        blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // DEPTH, DEPTH)
        largest = blocks.amax((1, 3)).T.contiguous()
    largest, bound = largest.clamp(min=LEAST), torch.finfo(FORMATS[format]).max
    most = torch.full_like(largest, bound)  # by a scalar, PyTorch divides in two roundings
    scaled = (x * of_each(most / largest, lines, k, block)).clamp(-bound, bound)
    numbers = torch.where(x.isfinite(), scaled, torch.nan).to(FORMATS[format])
    return torch.nn.functional.pad(numbers.view(torch.uint8), (0, -k % ALIGNED)), largest / most


def wide_of(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def of_each(scales, lines, k, block):
    """One scale for each number of (lines, k)."""
    if block == 0:
        return scales
    return scales.T.repeat_interleave(block, 0)[:lines].repeat_interleave(DEPTH, 1)[:, :k]


def values(numbers, scales, format, block, dtype):
    """What numbers and scales stand for."""
    lines, k = numbers.shape
    return numbers.view(FORMATS[format]).to(dtype) * of_each(scales.to(dtype), lines, k, block)


def rounded(x, format, block):
    """x as its numbers and scales have it, in float32 or float64, with zeros past k."""
    numbers, scales = quantise(x, format, block)
    return values(numbers, scales, format, block, wide_of(x))


def _if_wanted(wanted, matrix, block):
    """Numbers and scales of a matrix's transpose."""
    nothing = matrix.new_empty(0, dtype=torch.uint8), matrix.new_empty(0, dtype=torch.float32)
    return quantise(matrix.T, "e4m3", block) if wanted else nothing


@kernel(KERNELS, "fp8_weight")
def fp8_weight(weight, scaling, transposed):
    block = lines_of_block(scaling, True)
    return *quantise(weight, "e4m3", block), *_if_wanted(transposed, weight, block)


@kernel(KERNELS, "fp8_linear_forward")
def fp8_linear_forward(input, rows, row_scales, bias, scaling, transposed):
    block, wide = lines_of_block(scaling, False), wide_of(input)
    x, w = rounded(input, "e4m3", block), values(rows, row_scales, "e4m3", lines_of_block(scaling, True), wide)
    output = torch.nn.functional.linear(x, w, None if bias is None else bias.to(wide))
    return output.to(input.dtype), *_if_wanted(transposed, input, block)


@kernel(KERNELS, "fp8_linear_backward")
def fp8_linear_backward(
    grad_output, input_columns, input_scales, weight_columns, weight_scales, scaling, grad_format, weight_dtype, main,
    wanted,
):  # fmt: skip
    of_grad, of_weight = lines_of_block(scaling, False), lines_of_block(scaling, True)
    dtype, wide = grad_output.dtype, wide_of(grad_output)

    def product(grad, columns, scales, block):
        return rounded(grad, grad_format, of_grad) @ values(columns, scales, "e4m3", block, wide).T

    gradients = (
        (lambda: product(grad_output, weight_columns, weight_scales, of_weight).to(dtype), dtype),
        (
            lambda: added(product(grad_output.T, input_columns, input_scales, of_grad), main).to(weight_dtype),
            weight_dtype,
        ),
        (lambda: grad_output.sum(0, dtype=wide), wide),
    )
    return tuple(
        gradient() if want else grad_output.new_empty(0, dtype=of)
        for (gradient, of), want in zip(gradients, wanted, strict=True)
    )
