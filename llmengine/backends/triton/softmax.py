"""Softmax of rows (csrc/ops/softmax.h).

A program owns ROWS rows. Where a row fits a tile of at most WIDEST elements it is read once and stays in registers:
forward moves 2 elements per element of the input, backward 3, and both aim at the memory's bandwidth. A wider row is
swept in tiles: forward twice (running maximum and sum, then the result), backward twice (the product's sum, then the
result); the second sweep reads from the L2 cache what the first brought there.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import refuses_dtype, refuses_tensors, unit_last_stride
from llmengine.backends.triton.rows import row_tiles
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@triton.jit
def _forward(input, output, rows, columns, input_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    source, target = input + row * input_stride, output + row * columns
    column = tl.arange(0, BLOCK)[None, :]
    if ONE:
        inside = (row < rows) & (column < columns)
        x = tl.load(source + column, inside, -float("inf")).to(tl.float32)
        e = tl.exp(x - _shift(tl.max(x, 1))[:, None])
        tl.store(target + column, (e * _reciprocal(tl.sum(e, 1))[:, None]).to(output.dtype.element_ty), inside)
    else:
        largest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, columns, BLOCK):
            inside = (row < rows) & (start + column < columns)
            x = tl.load(source + start + column, inside, -float("inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(x, 1))
            shift = _shift(larger)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
            largest = larger
        shift, scale = _shift(largest), _reciprocal(total)
        for start in range(0, columns, BLOCK):
            inside = (row < rows) & (start + column < columns)
            x = tl.load(source + start + column, inside, -float("inf")).to(tl.float32)
            y = tl.exp(x - shift[:, None]) * scale[:, None]
            tl.store(target + start + column, y.to(output.dtype.element_ty), inside)


@triton.jit
def _shift(largest):
    """What is subtracted before exp: a row of -inf alone keeps -inf - 0, so that its exponentials are 0, not NaN."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _reciprocal(total):
    """A row whose exponentials are all 0 gives zeros."""
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def _backward(
    grad_output, output, grad_input, rows, columns, grad_stride, output_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    upstream, probabilities, target = grad_output + row * grad_stride, output + row * output_stride, row * columns
    column = tl.arange(0, BLOCK)[None, :]
    if ONE:
        inside = (row < rows) & (column < columns)
        g = tl.load(upstream + column, inside, 0.0).to(tl.float32)
        y = tl.load(probabilities + column, inside, 0.0).to(tl.float32)
        grad = (g - tl.sum(g * y, 1)[:, None]) * y
        tl.store(grad_input + target + column, grad.to(grad_input.dtype.element_ty), inside)
    else:
        product = tl.zeros([ROWS], tl.float32)
        for start in range(0, columns, BLOCK):
            inside = (row < rows) & (start + column < columns)
            g = tl.load(upstream + start + column, inside, 0.0).to(tl.float32)
            product += tl.sum(g * tl.load(probabilities + start + column, inside, 0.0).to(tl.float32), 1)
        for start in range(0, columns, BLOCK):
            inside = (row < rows) & (start + column < columns)
            g = tl.load(upstream + start + column, inside, 0.0).to(tl.float32)
            y = tl.load(probabilities + start + column, inside, 0.0).to(tl.float32)
            grad = (g - product[:, None]) * y
            tl.store(grad_input + target + start + column, grad.to(grad_input.dtype.element_ty), inside)


@kernel(KERNELS, "softmax_forward", lambda input, dtype: refuses_tensors(input) or refuses_dtype(dtype))
def softmax_forward(input, dtype):
    output = torch.empty(input.shape, dtype=dtype, device=input.device)
    if output.numel():
        source = unit_last_stride(input)
        grid, tile = row_tiles("softmax forward", source, *input.shape)
        _forward[grid](source, output, *input.shape, source.stride(0), **tile)
    return output


@kernel(KERNELS, "softmax_backward", lambda g, y, dtype: refuses_tensors(g, y) or refuses_dtype(dtype))
def softmax_backward(grad_output, output, dtype):
    grad_input = torch.empty(output.shape, dtype=dtype, device=output.device)
    if output.numel():
        upstream, probabilities = unit_last_stride(grad_output), unit_last_stride(output)
        grid, tile = row_tiles("softmax backward", probabilities, *output.shape)
        _backward[grid](
            upstream, probabilities, grad_input, *output.shape, upstream.stride(0), probabilities.stride(0), **tile
        )
    return grad_input


def aot_calls(dtype: torch.dtype):
    """Every class of width (aot.py)."""

    def call(columns):
        x = torch.empty(4096, columns, dtype=dtype, device="meta")
        softmax_backward(x, softmax_forward(x, dtype), dtype)

    for columns in (2048, 64, 16384, 131072, 50257):
        yield f"{columns}", functools.partial(call, columns)
