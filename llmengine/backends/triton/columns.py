"""Sums over the rows of a matrix, for bias gradients and for parts of split products: float32, in a fixed order.

A program adds up BLOCK columns over a share of the rows; where there are several shares, a second pass of the same
kernel adds those. Bytes: one read of the matrix; the limit is the memory's bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import multiprocessors
from llmengine.backends.triton.rows import power_of_2

ROWS, COLUMNS = 32, 128


@triton.jit
def _column_sums(x, sums, rows, columns, stride, rows_each, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * rows_each
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(x + row[:, None] * stride + column[None, :], inside, 0.0).to(tl.float32)
    place = sums + tl.program_id(1).to(tl.int64) * columns + column
    tl.store(place, tl.sum(total, 0).to(sums.dtype.element_ty), column < columns)


def column_sums(x, out=None):
    """(rows, columns) with unit column stride -> (columns,), into `out` where given, else float32."""
    rows, columns = x.shape
    if out is None:
        out = x.new_empty(columns, dtype=torch.float32)
    if not rows:
        return out.zero_()
    if columns:
        high = min(ROWS, power_of_2(rows))
        width = COLUMNS * ROWS // high
        blocks = -(-columns // width)
        parts = max(min(-(-rows // (4 * high)), 4 * multiprocessors(x.device) // blocks), 1)
        target = out if parts == 1 else out.new_empty((parts, columns), dtype=torch.float32)
        rows_each = -(-rows // (parts * high)) * high
        _column_sums[(blocks, parts)](x, target, rows, columns, x.stride(0), rows_each, high, width)
        if parts > 1:
            column_sums(target, out)
    return out
