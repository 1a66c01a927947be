"""Attention, forward: an online softmax over tiles of keys (formulas: csrc/ops/attention.h; Dao 2023).

A program owns `rows` query rows of one head. Their query tile stays in shared memory; the output tile (rows, width),
the running maximum and the running sum of each row stay in registers, in float32. Against every tile of `keys` keys
that one of its rows sees:

    products = query key^T                   4 rows keys head_dim flops for both products, on the tensor cores
    new maximum m, P = exp2(logits - m)      one maximum, one multiply-add, one exp2 and one add a score
    output = exp2(old m - m) output + P value

Keys and values stream through shared memory, num_stages tiles ahead. Tiles that no row sees are never visited, and
those that all rows see run without a comparison: only tiles at the edges of the band and of the sequence check it.

Memory: query and output once; keys and values once a program, from the L2 cache, where the programs of a head find
them side by side. Limit: the tensor cores; at head_dim 64 the exponentials take as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmengine.backends.triton.attention_tile import (
    LOG2E,
    address,
    exponential,
    keep_of,
    key_phases,
    load_rows,
    logits_of,
    place,
    sequence_of,
    shift_of,
    skip,
    span,
    store_rows,
    zero_rows,
)

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_kernel(query, key, value, output, lse, lse_low, sizes, option, shape):
    tile, head, index = place(sizes.tiles, sizes.heads)
    batch, row0, rows, key0, keys = sequence_of(index, sizes, option)
    statistic = (batch * sizes.heads + head) * sizes.rows + row0
    if option.cu_seqlens_q is not None:
        if index == sizes.sequences:
            zero_rows(output, batch, head, row0, rows, tile, sizes.tiles, shape.rows, shape.value_dim, shape.width)
            for first in range(tile * shape.rows, rows, sizes.tiles * shape.rows):
                row = first + tl.arange(0, shape.rows)
                tl.store(lse + statistic + row, tl.full([shape.rows], -float("inf"), tl.float32), row < rows)
                tl.store(lse_low + statistic + row, tl.zeros([shape.rows], tl.float32), row < rows)
            return
    first = (sizes.tiles - 1 - tile) * shape.rows  # the last rows first: where attention is causal they see most keys
    if first >= rows:
        return

    block = (batch, head, index, rows, keys, shift_of(rows, keys, option))
    key_head = head // (sizes.heads // sizes.key_heads)
    keys_at, values_at = address(key, batch, key_head, key0), address(value, batch, key_head, key0)
    query_at = address(query, batch, head, row0 + first)
    q = load_rows(query_at, query.row, rows - first, shape.rows, shape.head_dim, shape.depth, True)
    largest = tl.full([shape.rows], -float("inf"), tl.float32)
    total = tl.zeros([shape.rows], tl.float32)
    if option.sinks is not None:  # a logit before all others, whose value is 0
        largest = tl.zeros_like(largest) + tl.load(option.sinks + head) * (LOG2E if shape.fold else 1.0)
        total = tl.where(largest == -float("inf"), 0.0, 1.0)
    sums = tl.zeros([shape.rows, shape.width], tl.float32)
    phases = key_phases(first, block, option, shape.rows, shape.keys)
    for edges in tl.static_range(2):
        largest, total, sums = _attend(
            q, keys_at, key.row, values_at, value.row, largest, total, sums, first, phases, block, sizes.heads, option,
            shape, edges == 1,
        )  # fmt: skip

    none = total == 0.0
    sums *= tl.where(none, 0.0, 1.0 / total)[:, None]
    sums = tl.where(none[:, None], 0.0, sums)  # also where values that nobody sees are NaN
    store_rows(address(output, batch, head, row0 + first), output.row, rows - first, sums, shape.value_dim)
    row = first + tl.arange(0, shape.rows)
    high, low = _logarithm(largest, total, shape.fold)
    tl.store(lse + statistic + row, high, row < rows)
    tl.store(lse_low + statistic + row, low, row < rows)


@triton.jit
def _attend(
    q, keys_at, key_stride, values_at, value_stride, largest, total, sums, first_row, phases, block, heads, option,
    shape, EDGES: tl.constexpr,
):  # fmt: skip
    """(maxima, sums of exponentials, sums of values) after the full tiles of keys, or those at the edges."""
    row = (first_row + tl.arange(0, shape.rows))[:, None]
    keys = block[4]
    start, stop = span(phases, EDGES)
    for position in tl.range(start, stop, shape.keys):
        first = skip(position, phases, EDGES)
        key_at, value_at = (
            keys_at + tl.cast(first, tl.int64) * key_stride,
            values_at + tl.cast(first, tl.int64) * value_stride,
        )
        k = load_rows(key_at, key_stride, keys - first, shape.keys, shape.head_dim, shape.depth, EDGES)
        products = tl.dot(q, k.T, input_precision=shape.precision)
        key = (first + tl.arange(0, shape.keys))[None, :]
        logits, _ = logits_of(products, row, key, block, option, shape.fold, EDGES)
        larger = tl.maximum(largest, tl.max(logits, 1) * (option.factor if shape.fold else 1.0))
        # rows that have seen no key yet: -inf - 0 keeps their exponentials 0, not NaN
        base = tl.where(larger == -float("inf"), 0.0, larger)
        p = exponential(logits, base[:, None], option, shape.fold)
        beta = tl.exp2(largest - base) if shape.fold else tl.exp(largest - base)
        total = total * beta + tl.sum(p, 1)
        if option.seed is not None:
            p *= keep_of(block, heads, first_row, first, option, shape.rows, shape.keys)
        v = load_rows(value_at, value_stride, keys - first, shape.keys, shape.value_dim, shape.width, EDGES)
        sums = tl.dot(p.to(v.dtype), v, sums * beta[:, None], input_precision=shape.precision)
        largest = larger
    return largest, total, sums


@triton.jit
def _logarithm(largest, total, FOLD: tl.constexpr):
    """The logarithm of the sum of exponentials, and what rounding takes from it."""
    some = total != 0.0
    shift = tl.where(some, largest, 0.0).to(tl.float64) * (LN2 if FOLD else 1.0)
    added = tl.log(tl.where(some, total, 1.0).to(tl.float64))
    high = tl.where(some, shift + added, -float("inf")).to(tl.float32)
    # beyond 2^53 no sum holds what total adds
    low = tl.where(tl.abs(high) == float("inf"), 0.0, shift - high.to(tl.float64) + added)
    return high, low.to(tl.float32)
