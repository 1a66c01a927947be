"""Relative attention, forward: attention's online softmax (attention_forward.py) with the position scores of
relative_tile.py.

A program owns `rows` query rows of one head: both query tiles in shared memory, the output tile and the statistics in
registers. Against every tile of keys, beside attention's two products: two or three of the same size with blocks of
position keys (more where the rows stand far apart), and a gather each. Limit: the tensor cores, and the gathers, which
go through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmengine.backends.triton.attention_tile import address, place, sequence_of, store_rows, zero_rows
from llmengine.backends.triton.relative_tile import (
    keep_at,
    last_key,
    open_tile,
    position_scores,
    positions_of,
    seen_logits,
)


@triton.jit
def forward_kernel(query, position_query, key, value, output, lse, lse_low, sizes, option, shape):
    tile, head, index = place(sizes.tiles, sizes.heads)
    batch, row0, rows, key0, keys = sequence_of(index, sizes, option)
    statistic = tl.cast(head, tl.int64) * sizes.rows + row0
    if index == sizes.sequences:  # rows that belong to no sequence
        zero_rows(output, batch, head, row0, rows, tile, sizes.tiles, shape.rows, shape.value_dim, shape.width)
        for first in range(tile * shape.rows, rows, sizes.tiles * shape.rows):
            row = first + tl.arange(0, shape.rows)
            tl.store(lse + statistic + row, tl.full([shape.rows], -float("inf"), tl.float32), row < rows)
            tl.store(lse_low + statistic + row, tl.zeros([shape.rows], tl.float32), row < rows)
        return
    first = (sizes.tiles - 1 - tile) * shape.rows
    if first >= rows:
        return

    q = open_tile(query, head, row0 + first, rows - first, shape.rows, shape.head_dim, shape.depth)
    pq = open_tile(position_query, head, row0 + first, rows - first, shape.rows, shape.head_dim, shape.depth)
    position = positions_of(first, row0, rows, keys, option, shape.rows)
    row = (first + tl.arange(0, shape.rows))[:, None]
    largest = tl.full([shape.rows], -float("inf"), tl.float32)
    total = tl.zeros([shape.rows], tl.float32)
    sums = tl.zeros([shape.rows, shape.width], tl.float32)
    for first_key in tl.range(0, last_key(position, keys, option), shape.keys):
        k = open_tile(key, head, key0 + first_key, keys - first_key, shape.keys, shape.head_dim, shape.depth)
        products = tl.dot(q, k.T, input_precision=shape.precision)
        products += position_scores(pq, position, first_key, head, option, shape)
        column = (first_key + tl.arange(0, shape.keys))[None, :]
        logits = seen_logits(
            products, position[:, None], row, column, row0, rows, key0, keys, head, sizes.heads, option
        )
        larger = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(larger == -float("inf"), 0.0, larger)
        p = tl.exp(logits - base[:, None])
        beta = tl.exp(largest - base)
        total = total * beta + tl.sum(p, 1)
        if option.seed is not None:
            p *= keep_at(head, index, sizes.heads, first, first_key, option, shape)
        v = open_tile(value, head, key0 + first_key, keys - first_key, shape.keys, shape.value_dim, shape.width)
        sums = tl.dot(p.to(v.dtype), v, sums * beta[:, None], input_precision=shape.precision)
        largest = larger

    sums *= tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    store_rows(address(output, batch, head, row0 + first), output.row, rows - first, sums, shape.value_dim)
    lane = first + tl.arange(0, shape.rows)
    exact = tl.where(total != 0.0, largest, 0.0).to(tl.float64) + tl.log(
        tl.where(total != 0.0, total, 1.0).to(tl.float64)
    )
    high = tl.where(total != 0.0, exact, -float("inf")).to(tl.float32)
    low = tl.where(tl.abs(high) == float("inf"), 0.0, exact - high.to(tl.float64)).to(tl.float32)
    tl.store(lse + statistic + lane, high, lane < rows)
    tl.store(lse_low + statistic + lane, low, lane < rows)
