"""Layer norm and RMS norm of rows, with an optional residual add and dropout in front (csrc/ops/norm.h).

Forward: a program owns ROWS rows. A row of at most WIDEST elements is read once and stays in registers; of a wider one
a first sweep gathers the statistics (mean and squared deviations of each tile, merged as Chan et al. do), a second,
which reads from the L2 cache what the first brought there, writes the result. Bytes: one read of each input, one write
of each output.

Backward: a resident grid of programs walks over the rows, tile after tile, each program keeping its sums of
grad_weight and grad_bias in registers; the (programs, columns) partial sums are added in a fixed order by a second,
small kernel: no atomics, equal bits at every run. Bytes: one read of grad_output, h and grad_new_residual, one write of
each gradient. Beyond BACKWARD_WIDEST the registers cannot hold a row and its sums: the gradient of the rows is then
swept as in the forward, and the columns' sums are a pass of their own (grad_output and h are read twice).

Both aim at the memory's bandwidth.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import dropped_below, multiprocessors, refuses_tensors, unit_last_stride
from llmengine.backends.triton.philox import keep_multipliers
from llmengine.backends.triton.rows import row_tiles
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

# A row, its gradient and the two running sums are 4 float32 numbers a column in the registers of 512 threads.
BACKWARD_WIDEST = 8192
# Warps that a resident grid keeps on a multiprocessor.
RESIDENT_WARPS = 16
# Tiles of the kernels that add up columns: rows x columns.
SUM_TILE = (32, 64)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward(
    input, residual, weight, bias, seed, output, new_residual, mean, rstd,
    rows, columns, input_stride, residual_stride, eps, threshold, keep_scale,
    SUBTRACT_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    if ONE:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        h = _hidden(
            input, residual, seed, new_residual, row, 0, inside,
            columns, input_stride, residual_stride, threshold, keep_scale, BLOCK,
        )  # fmt: skip
        if SUBTRACT_MEAN:
            # A large mean is rounded by more than the row varies: what the rounding left is taken off as well.
            centre = tl.sum(h, 1) / columns
            h = tl.where(inside, h - centre[:, None], 0.0)
            left = tl.sum(h, 1) / columns
            tl.store(mean + row, centre + left, row < rows)
            variance = tl.sum(h * h, 1) / columns - left * left
            h -= left[:, None]
        else:
            variance = tl.sum(h * h, 1) / columns
        scale = tl.rsqrt(variance + eps)
        tl.store(rstd + row, scale, row < rows)
        y = _affine(h * scale[:, None], weight, bias, column, column < columns)
        tl.store(output + row[:, None] * columns + column[None, :], y.to(output.dtype.element_ty), inside)
    else:
        centre = tl.zeros([ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, columns, BLOCK):
            inside = (row < rows)[:, None] & (start + column < columns)[None, :]
            h = _hidden(
                input, residual, seed, new_residual, row, start, inside,
                columns, input_stride, residual_stride, threshold, keep_scale, BLOCK,
            )  # fmt: skip
            if SUBTRACT_MEAN:
                before, here = start * 1.0, tl.minimum(columns - start, BLOCK) * 1.0
                tile_centre = tl.sum(h, 1) / here
                distance = tile_centre - centre
                h = tl.where(inside, h - tile_centre[:, None], 0.0)
                centre += distance * (here / (before + here))
                squares += distance * distance * (before * here / (before + here))
            squares += tl.sum(h * h, 1)
        scale = tl.rsqrt(squares / columns + eps)
        tl.store(rstd + row, scale, row < rows)
        if SUBTRACT_MEAN:
            tl.store(mean + row, centre, row < rows)
        tl.debug_barrier()  # a thread may read below what another wrote to new_residual above
        for start in range(0, columns, BLOCK):
            inside = (row < rows)[:, None] & (start + column < columns)[None, :]
            target = row[:, None] * columns + (start + column)[None, :]
            if residual is not None:
                h = tl.load(new_residual + target, inside, 0.0).to(tl.float32)
            else:
                h = _hidden(
                    input, None, seed, None, row, start, inside,
                    columns, input_stride, residual_stride, threshold, keep_scale, BLOCK,
                )  # fmt: skip
            x = (h - centre[:, None]) * scale[:, None]
            y = _affine(x, weight, bias, start + column, start + column < columns)
            tl.store(output + target, y.to(output.dtype.element_ty), inside)


@triton.jit
def _hidden(
    input, residual, seed, new_residual, row, start, inside,
    columns, input_stride, residual_stride, threshold, keep_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of what is normalised: residual + dropout(input), rounded and stored where there is a residual."""
    column = (start + tl.arange(0, BLOCK))[None, :]
    h = tl.load(input + row[:, None] * input_stride + column, inside, 0.0).to(tl.float32)
    if seed is not None:
        groups = start // 4 + tl.arange(0, BLOCK // 4)
        h *= keep_multipliers(seed, threshold, keep_scale, 0, row, groups)
    if residual is not None:
        h += tl.load(residual + row[:, None] * residual_stride + column, inside, 0.0).to(tl.float32)
        rounded = h.to(new_residual.dtype.element_ty)
        tl.store(new_residual + row[:, None] * columns + column, rounded, inside)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def _affine(x, weight, bias, column, inside):
    if weight is not None:
        x *= tl.load(weight + column, inside, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        x += tl.load(bias + column, inside, 0.0).to(tl.float32)[None, :]
    return x


def _forward_refuses(input, residual, weight, bias, *_):
    return refuses_tensors(input, residual, weight, bias)


@kernel(KERNELS, "norm_forward", _forward_refuses)
def norm_forward(input, residual, weight, bias, seed, eps, dropout_p, subtract_mean):
    rows, columns = input.shape
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    new_residual = torch.empty_like(output) if residual is not None else input.new_empty(0)
    rstd = input.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if subtract_mean else rstd.new_empty(0)
    if rows:
        source = unit_last_stride(input)
        added = None if residual is None else unit_last_stride(residual)
        grid, tile = row_tiles("norm forward", source, rows, columns)
        _forward[grid](
            source, added, _line(weight), _line(bias), seed if dropout_p > 0 else None, output, new_residual, mean,
            rstd, rows, columns, source.stride(0), 0 if added is None else added.stride(0), eps,
            dropped_below(dropout_p), 1.0 / (1.0 - dropout_p), subtract_mean, **tile,
        )  # fmt: skip
    return output, new_residual, mean, rstd


def _line(parameter):
    return None if parameter is None else parameter.contiguous()


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _backward(
    grad_output, grad_new_residual, h, weight, mean, rstd, seed, grad_input, grad_residual, partial_sums,
    rows, columns, grad_stride, grad_new_stride, h_stride, threshold, keep_scale,
    SUBTRACT_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        grad, x = _grad_and_normalised(
            grad_output, h, mean, rstd, row, column, inside, rows, grad_stride, h_stride, SUBTRACT_MEAN
        )
        weight_sum += grad * x
        bias_sum += grad
        g = grad * _weights(weight, column, column < columns, BLOCK)  # from the L1 cache: registers are dearer
        grad_h = g - x * (tl.sum(g * x, 1) / columns)[:, None]
        if SUBTRACT_MEAN:
            grad_h -= (tl.sum(g, 1) / columns)[:, None]
        grad_h *= tl.load(rstd + row, row < rows, 0.0)[:, None]
        _store_gradients(
            grad_h, grad_new_residual, seed, grad_input, grad_residual, row, 0, inside,
            columns, grad_new_stride, threshold, keep_scale, BLOCK,
        )  # fmt: skip
    mine = partial_sums + tl.program_id(0).to(tl.int64) * 2 * columns + column
    tl.store(mine, tl.sum(weight_sum, 0), column < columns)
    tl.store(mine + columns, tl.sum(bias_sum, 0), column < columns)


@triton.jit
def _backward_wide(
    grad_output, grad_new_residual, h, weight, mean, rstd, seed, grad_input, grad_residual,
    rows, columns, grad_stride, grad_new_stride, h_stride, threshold, keep_scale,
    SUBTRACT_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    product = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        grad, x = _grad_and_normalised(
            grad_output, h, mean, rstd, row, column, inside, rows, grad_stride, h_stride, SUBTRACT_MEAN
        )
        g = grad * _weights(weight, column, column < columns, BLOCK)
        product += tl.sum(g * x, 1)
        total += tl.sum(g, 1)
    scale = tl.load(rstd + row, row < rows, 0.0)[:, None]
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        grad, x = _grad_and_normalised(
            grad_output, h, mean, rstd, row, column, inside, rows, grad_stride, h_stride, SUBTRACT_MEAN
        )
        grad_h = grad * _weights(weight, column, column < columns, BLOCK) - x * (product / columns)[:, None]
        if SUBTRACT_MEAN:
            grad_h -= (total / columns)[:, None]
        _store_gradients(
            grad_h * scale, grad_new_residual, seed, grad_input, grad_residual, row, start, inside,
            columns, grad_new_stride, threshold, keep_scale, BLOCK,
        )  # fmt: skip


@triton.jit
def _parameter_sums(
    grad_output, h, mean, rstd, partial_sums, rows, columns, grad_stride, h_stride, rows_each,
    SUBTRACT_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For wide rows: a program adds up BLOCK columns over rows_each rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * rows_each
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        grad, x = _grad_and_normalised(
            grad_output, h, mean, rstd, row, column, inside, rows, grad_stride, h_stride, SUBTRACT_MEAN
        )
        weight_sum += grad * x
        bias_sum += grad
    mine = partial_sums + tl.program_id(1).to(tl.int64) * 2 * columns + column
    tl.store(mine, tl.sum(weight_sum, 0), column < columns)
    tl.store(mine + columns, tl.sum(bias_sum, 0), column < columns)


@triton.jit
def _add_partial_sums(
    partial_sums, grad_weight, grad_bias, parts, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (part < parts)[:, None] & (column < columns)[None, :]
        source = partial_sums + part[:, None] * 2 * columns + column[None, :]
        weight_sum += tl.load(source, inside, 0.0)
        bias_sum += tl.load(source + columns, inside, 0.0)
    tl.store(grad_weight + column, tl.sum(weight_sum, 0), column < columns)
    tl.store(grad_bias + column, tl.sum(bias_sum, 0), column < columns)


@triton.jit
def _weights(weight, column, inside, BLOCK: tl.constexpr):
    if weight is not None:
        return tl.load(weight + column, inside, 0.0).to(tl.float32)[None, :]
    else:
        return tl.full([1, BLOCK], 1.0, tl.float32)


@triton.jit
def _grad_and_normalised(
    grad_output, h, mean, rstd, row, column, inside, rows, grad_stride, h_stride, SUBTRACT_MEAN: tl.constexpr
):
    """A tile of grad_output and of x = (h - mean) rstd, 0 outside."""
    grad = tl.load(grad_output + row[:, None] * grad_stride + column[None, :], inside, 0.0).to(tl.float32)
    x = tl.load(h + row[:, None] * h_stride + column[None, :], inside, 0.0).to(tl.float32)
    if SUBTRACT_MEAN:
        x = tl.where(inside, x - tl.load(mean + row, row < rows, 0.0)[:, None], 0.0)
    return grad, x * tl.load(rstd + row, row < rows, 0.0)[:, None]


@triton.jit
def _store_gradients(
    grad_h, grad_new_residual, seed, grad_input, grad_residual, row, start, inside,
    columns, grad_new_stride, threshold, keep_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    column = (start + tl.arange(0, BLOCK))[None, :]
    if grad_new_residual is not None:
        grad_h += tl.load(grad_new_residual + row[:, None] * grad_new_stride + column, inside, 0.0).to(tl.float32)
    target = row[:, None] * columns + column
    if grad_residual is not None:
        tl.store(grad_residual + target, grad_h.to(grad_residual.dtype.element_ty), inside)
    if seed is not None:
        groups = start // 4 + tl.arange(0, BLOCK // 4)
        grad_h *= keep_multipliers(seed, threshold, keep_scale, 0, row, groups)
    tl.store(grad_input + target, grad_h.to(grad_input.dtype.element_ty), inside)


def _backward_refuses(grad_output, grad_new_residual, h, weight, *_):
    return refuses_tensors(grad_output, grad_new_residual, h, weight)


@kernel(KERNELS, "norm_backward", _backward_refuses)
def norm_backward(grad_output, grad_new_residual, h, weight, mean, rstd, seed, dropout_p, subtract_mean, split):
    rows, columns = h.shape
    grad_input = torch.empty_like(h, memory_format=torch.contiguous_format)
    grad_residual = torch.empty_like(grad_input) if split else h.new_empty(0)
    grad_weight = h.new_empty(columns, dtype=torch.float32)
    grad_bias = torch.empty_like(grad_weight)
    if not grad_input.numel():
        return grad_input, grad_residual, grad_weight.zero_(), grad_bias.zero_()
    upstream, source = unit_last_stride(grad_output), unit_last_stride(h)
    added = None if grad_new_residual is None else unit_last_stride(grad_new_residual)
    grid, tile = row_tiles("norm backward", source, rows, columns, BACKWARD_WIDEST)
    one = tile.pop("ONE")
    gradients = (
        upstream, added, source, _line(weight), mean, rstd, seed if dropout_p > 0 else None, grad_input,
        grad_residual if split else None,
    )  # fmt: skip
    sizes = (
        rows, columns, upstream.stride(0), 0 if added is None else added.stride(0), source.stride(0),
        dropped_below(dropout_p), 1.0 / (1.0 - dropout_p), subtract_mean,
    )  # fmt: skip
    resident = multiprocessors(h.device) * max(RESIDENT_WARPS // tile["num_warps"], 1)
    sum_rows, sum_columns = SUM_TILE
    blocks = -(-columns // sum_columns)
    if one:
        parts = min(grid[0], resident)
        partial_sums = grad_weight.new_empty(parts, 2, columns)
        _backward[(parts,)](*gradients, partial_sums, *sizes, **tile)
    else:
        grid, tile = row_tiles("norm backward wide", source, rows, columns, BACKWARD_WIDEST // 2)
        tile.pop("ONE")
        tile["num_warps"] = min(2 * tile["num_warps"], 16)  # few registers a thread: addresses take many
        _backward_wide[grid](*gradients, *sizes, **tile)
        parts = max(min(-(-rows // sum_rows), 4 * resident // blocks), 1)
        rows_each = -(-rows // (parts * sum_rows)) * sum_rows
        partial_sums = grad_weight.new_empty(parts, 2, columns)
        _parameter_sums[(blocks, parts)](
            upstream, source, mean, rstd, partial_sums, rows, columns, upstream.stride(0), source.stride(0), rows_each,
            subtract_mean, sum_rows, sum_columns,
        )  # fmt: skip
    _add_partial_sums[(blocks,)](partial_sums, grad_weight, grad_bias, parts, columns, sum_rows, sum_columns)
    return grad_input, grad_residual, grad_weight, grad_bias


# ---- ahead-of-time compilation ---------------------------------------------------------------------------------------


def aot_calls(dtype: torch.dtype):
    """Layer and RMS norm, bare and with everything, of every class of width (aot.py)."""

    def call(rows, columns, subtract_mean, added):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        x, line, statistic = empty(rows, columns), empty(columns), empty(rows, dtype=torch.float32)
        other = x if added else None
        dropout_p, seed = (0.1, empty(1, dtype=torch.int64)) if added else (0.0, None)
        mean = statistic if subtract_mean else empty(0, dtype=torch.float32)
        norm_forward(x, other, line, line if subtract_mean else None, seed, 1e-5, dropout_p, subtract_mean)
        norm_backward(x, other, x, line, mean, statistic, seed, dropout_p, subtract_mean, added)

    for columns, subtract_mean, added in [
        (768, True, True), (768, False, False), (4096, False, True), (5000, True, False), (8192, True, True),
        (16384, True, True), (16384, False, False), (65536, True, True), (40001, False, False),
    ]:  # fmt: skip
        kind = ("layer" if subtract_mean else "rms") + (" added" if added else "")
        yield f"{columns} {kind}", functools.partial(call, 4096, columns, subtract_mean, added)
