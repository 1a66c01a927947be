"""Rows of a table by token id, and the table's gradient (csrc/ops/embedding.h).

Forward: a program copies ROWS tokens' rows, in tiles. 2 e bytes an element (e: bytes of an element).

Backward, without atomics, so that its bits are the same on every run: tokens come sorted by id, equal ids in their
order, and are cut into chunks. A program adds up a chunk's rows; where the id changes, a sum is done and goes to the
gradient, or, if its run reaches beyond the chunk, to `partial`. Runs that go on beyond their chunk are then added up by
the program of the chunk that they begin in. Limit of both: the memory's bandwidth.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import refuses_tensors, unit_last_stride
from llmengine.backends.triton.rows import power_of_2, row_tiles
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

CHUNK = 16  # tokens
WIDEST = 1024  # columns of a tile
JOINED = 8  # chunks that the second pass adds at a time


@triton.jit
def _gather(ids, weight, output, tokens, rows, columns, weight_stride, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + token, token < tokens, 0)
    known = (id >= 0) & (id < rows)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    place = weight + id[:, None] * weight_stride + column[None, :]
    x = tl.load(place, inside & known[:, None], 0.0).to(tl.float32) * scale
    x = tl.where(known[:, None], x, float("nan"))
    tl.store(output + token[:, None] * columns + column[None, :], x.to(output.dtype.element_ty), inside)


@triton.jit
def _runs(
    ids, order, grad_output, partial, grad_weight, tokens, rows, columns, grad_stride, padding_idx, scale,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = chunk * CHUNK
    before = tl.load(ids + first - 1, first > 0, -1)
    inherited = (first > 0) & (before == tl.load(ids + first))
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(CHUNK):
        place = first + k
        real = place < tokens
        id = tl.load(ids + place, real, -1)
        counts = real & (id >= 0) & (id < rows) & (id != padding_idx)
        token = tl.load(order + place, real, 0)
        inside = column < tl.where(counts, columns, 0)
        total += tl.load(grad_output + token * grad_stride + column, inside, 0.0).to(tl.float32)
        goes_on = (place + 1 < tokens) & (tl.load(ids + place + 1, place + 1 < tokens, -1) == id)
        leaves = real & goes_on & (k == CHUNK - 1)
        done = real & (goes_on == 0)
        part = partial + (2 * chunk + tl.where(inherited, 0, 1)) * columns + column
        tl.store(part, total, column < tl.where(leaves | (done & inherited), columns, 0))
        row = grad_weight + id.to(tl.int64) * columns + column
        sum = (total * scale).to(grad_weight.dtype.element_ty)
        tl.store(row, sum, column < tl.where(done & (inherited == 0) & counts, columns, 0))
        total = tl.where(done, 0.0, total)
        inherited = inherited & (done == 0)


@triton.jit
def _join(
    ids, ends, partial, grad_weight, tokens, rows, columns, padding_idx, scale, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, next = chunk * CHUNK, chunk * CHUNK + CHUNK
    id = tl.load(ids + next, next < tokens, -1)
    goes_on = (next < tokens) & (tl.load(ids + next - 1, next < tokens, -2) == id)
    began_earlier = (first > 0) & (tl.load(ids + first - 1, (first > 0) & goes_on, -2) == id)
    counts = goes_on & (began_earlier == 0) & (id >= 0) & (id < rows) & (id != padding_idx)
    last = tl.where(counts, (tl.load(ends + chunk, goes_on, 0) - 1) // CHUNK, chunk - 1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(chunk, last + 1, ROWS):
        other = start + tl.arange(0, ROWS)
        part = partial + (2 * other + tl.where(other == chunk, 1, 0)) * columns
        inside = (other <= last)[:, None] & (column < columns)[None, :]
        total += tl.load(part[:, None] + column[None, :], inside, 0.0)
    row = grad_weight + id.to(tl.int64) * columns + column
    sum = (tl.sum(total, 0) * scale).to(grad_weight.dtype.element_ty)
    tl.store(row, sum, column < tl.where(counts, columns, 0))


def _forward_refuses(input, weight, scale):
    return refuses_tensors(input, weight)


@kernel(KERNELS, "embedding_forward", _forward_refuses)
def embedding_forward(input, weight, scale):
    tokens, (rows, columns) = input.shape[0], weight.shape
    output = weight.new_empty((tokens, columns))
    if output.numel():
        table = unit_last_stride(weight)
        (programs,), tile = row_tiles("embedding", table, tokens, columns, WIDEST)
        tile.pop("ONE")
        _gather[(programs, triton.cdiv(columns, tile["BLOCK"]))](
            input.contiguous(), table, output, tokens, rows, columns, table.stride(0), scale, **tile
        )
    return output


def _backward_refuses(grad_output, input, *_):
    return refuses_tensors(grad_output, input)


@kernel(KERNELS, "embedding_backward", _backward_refuses)
def embedding_backward(grad_output, input, rows, padding_idx, scale):
    tokens, columns = grad_output.shape
    grad_weight = grad_output.new_zeros((rows, columns))
    if grad_output.numel():
        # of half as many bits: half as many passes; what is no row stays none
        ids, order = input.clamp(-1, rows).to(torch.int32).sort(stable=True)
        chunks = triton.cdiv(tokens, CHUNK)
        ends = torch.searchsorted(ids, ids[CHUNK - 1 :: CHUNK].contiguous(), right=True)  # of whole chunks' last runs
        partial = grad_output.new_empty((chunks, 2, columns), dtype=torch.float32)
        gradients, block = unit_last_stride(grad_output), min(power_of_2(columns), WIDEST)
        grid = (chunks, triton.cdiv(columns, block))
        _runs[grid](
            ids, order, gradients, partial, grad_weight, tokens, rows, columns, gradients.stride(0), padding_idx, scale,
            CHUNK, block, num_warps=4,
        )  # fmt: skip
        _join[grid](
            ids, ends, partial, grad_weight, tokens, rows, columns, padding_idx, scale, CHUNK, JOINED, block,
            num_warps=4,
        )  # fmt: skip
    return grad_weight


def aot_calls(dtype: torch.dtype):
    """Rows of a model's width, and rows that no vector fits."""

    def call(columns, scale):
        weight = torch.empty(50257, columns, dtype=dtype, device="meta")
        input = torch.empty(8192, dtype=torch.int64, device="meta")
        embedding_backward(embedding_forward(input, weight, scale), input, 50257, 0, scale)

    for columns, scale in ((768, 1.0), (4096, 64.0), (515, 1.0)):
        yield f"{columns}", functools.partial(call, columns, scale)
