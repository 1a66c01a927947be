"""Attention, backward: probabilities are made again from lse, tile by tile (formulas: csrc/ops/attention.h).

    statistics_kernel   delta = rowsum(grad_output output) - grad_lse, lse in units of log 2, and what each tile of rows
                        gives to the gradient of its head's sink: one sweep of both
    keys_kernel         a program owns a tile of keys of one key head: grad_key and grad_value in registers, key and
                        value in shared memory; query and grad_output stream by, head after head of the group
    rows_kernel         a program owns a tile of query rows of one head: grad_query in registers; keys and values
                        stream by; of a bias by distance it sums the gradients of both ends
    mask_kernel         where it is asked for, a program owns a tile of the mask and goes through all batch entries,
                        heads and rows that share it

Against every tile (rows, keys) of scores that are seen:

    P = exp2(logits - lse),  G = P (grad_output value^T keep - delta) cap'
    keys_kernel:  grad_value += (P keep)^T grad_output,  grad_key += G^T query      8 rows keys head_dim flops
    rows_kernel:  grad_query += G key                                               6 rows keys head_dim flops

keys_kernel holds its tiles of scores transposed, so that they are the first operand of its products as they lie in
registers. Every sum is made by one program in a fixed order: no atomics, equal bits in every run, no buffer beyond
two floats a row; the price is that the scores and grad_output value^T are made twice, 14 products' flops where
atomics would need 10. Limit: the tensor cores.
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
    row_phases,
    sequence_of,
    shift_of,
    skip,
    span,
    store_rows,
    zero_rows,
)


@triton.jit
def statistics_kernel(output, grad_output, lse, low, grad_lse, base, delta, sinks, grad_sinks, heads, rows, shape):
    """base: lse as `exponential` takes it, with 0 for -inf: of a row that sees no key, exp(-inf - 0) is 0, not NaN.
    grad_sinks: (batch, heads, tiles), yet to be added up.

    delta is added up as grad_output value^T is, by the same product: where a row has one key, and output is its value,
    delta takes the rounding errors of that product with it.
    """
    tile, head, index = place(tl.cdiv(rows, shape.rows), heads)
    batch, first = index.to(tl.int64), tile * shape.rows
    count = rows - first
    output_at, grad_at = address(output, batch, head, first), address(grad_output, batch, head, first)
    o = load_rows(output_at, output.row, count, shape.rows, shape.value_dim, shape.width, True)
    g = load_rows(grad_at, grad_output.row, count, shape.rows, shape.value_dim, shape.width, True)
    lane = tl.arange(0, shape.rows)
    products = tl.dot(g, o.T, input_precision=shape.precision)
    change = tl.sum(tl.where(lane[:, None] == lane[None, :], products, 0.0), 1)
    at, inside = (batch * heads + head) * rows + first + lane, lane < count
    if grad_lse is not None:
        change -= tl.load(grad_lse + at, inside, 0.0)
    tl.store(delta + at, change, inside)
    logarithm = tl.load(lse + at, inside, -float("inf"))
    sees = logarithm != -float("inf")
    logarithm = tl.where(sees, logarithm, 0.0)
    if grad_sinks is not None:
        exponent = tl.load(sinks + head) - logarithm
        if low is not None:
            exponent -= tl.load(low + at, inside, 0.0)
        of_row = tl.where(sees, tl.exp(exponent) * change, 0.0)  # whatever a row of no sequence holds
        tl.store(grad_sinks + tl.program_id(0), -tl.sum(of_row))
    tl.store(base + at, logarithm * (LOG2E if shape.fold else 1.0), inside)


@triton.jit
def _gradients(products, grad_p, keep, row, key, base, low, delta, block, option, shape, EDGES: tl.constexpr):
    """(P keep, gradient of the logits, of what the soft cap is taken of), from both products of a tile."""
    logits, slope = logits_of(products, row, key, block, option, shape.fold, EDGES)
    if low is None:
        p = exponential(logits, base, option, shape.fold)
    else:  # what rounding took from lse, which float32 alone sees
        p = tl.exp((logits - base) - low)
    kept = p
    if option.seed is not None:
        kept = p * keep
        grad_p = grad_p * keep
    grad_logits = p * (grad_p - delta)
    return kept, grad_logits, grad_logits * slope


# ---- grad_key, grad_value --------------------------------------------------------------------------------------------


@triton.jit
def keys_kernel(query, key, value, grad_output, grad_key, grad_value, base, low, delta, sizes, option, shape):
    tile, key_head, index = place(sizes.tiles, sizes.key_heads)
    batch, row0, rows, key0, keys = sequence_of(index, sizes, option)
    if option.cu_seqlens_q is not None:
        if index == sizes.sequences:
            tiles = sizes.tiles
            zero_rows(grad_key, batch, key_head, key0, keys, tile, tiles, shape.keys, shape.head_dim, shape.depth)
            zero_rows(grad_value, batch, key_head, key0, keys, tile, tiles, shape.keys, shape.value_dim, shape.width)
            return
    first = tile * shape.keys
    if first >= keys:
        return

    key_at, value_at = address(key, batch, key_head, key0 + first), address(value, batch, key_head, key0 + first)
    k = load_rows(key_at, key.row, keys - first, shape.keys, shape.head_dim, shape.depth, True)
    v = load_rows(value_at, value.row, keys - first, shape.keys, shape.value_dim, shape.width, True)
    dk = tl.zeros([shape.keys, shape.depth], tl.float32)
    dv = tl.zeros([shape.keys, shape.width], tl.float32)
    block = (batch, key_head, index, rows, keys, shift_of(rows, keys, option))
    phases = row_phases(first, block, option, shape.rows, shape.keys)
    for edges in tl.static_range(2):
        dk, dv = _add_rows(
            k, v, dk, dv, query, grad_output, base, low, delta, row0, first, phases, block, sizes, option, shape,
            edges == 1,
        )  # fmt: skip
    store_rows(address(grad_key, batch, key_head, key0 + first), grad_key.row, keys - first, dk * option.scale,
               shape.head_dim)  # fmt: skip
    store_rows(address(grad_value, batch, key_head, key0 + first), grad_value.row, keys - first, dv, shape.value_dim)


@triton.jit
def _add_rows(
    k, v, dk, dv, query, grad_output, base, low, delta, row0, first_key, phases, block, sizes, option, shape,
    EDGES: tl.constexpr,
):  # fmt: skip
    """grad_key / scale and grad_value with what the full tiles of rows add, or those at the edges.

    One loop goes through the tiles of all heads of the group: a second one around it would take registers.
    """
    batch, key_head, index, rows, keys, shift = block
    key = (first_key + tl.arange(0, shape.keys))[:, None]
    start, stop = span(phases, EDGES)
    group, tiles = sizes.heads // sizes.key_heads, tl.cdiv(stop - start, shape.rows)
    for n in tl.range(0, group * tiles):
        head = key_head * group + n // tiles
        first = skip(start + n % tiles * shape.rows, phases, EDGES)
        query_at, grad_at = address(query, batch, head, row0 + first), address(grad_output, batch, head, row0 + first)
        q = load_rows(query_at, query.row, rows - first, shape.rows, shape.head_dim, shape.depth, EDGES)
        g = load_rows(grad_at, grad_output.row, rows - first, shape.rows, shape.value_dim, shape.width, EDGES)
        row = first + tl.arange(0, shape.rows)
        statistic = (batch * sizes.heads + head) * sizes.rows + row0
        # rows beyond the last: an infinite lse makes their probabilities 0
        row_base = _statistic(base + statistic, row, rows, float("inf"), EDGES)
        row_low = None if low is None else _statistic(low + statistic, row, rows, 0.0, EDGES)
        row_delta = _statistic(delta + statistic, row, rows, 0.0, EDGES)
        block = (batch, head, index, rows, keys, shift)
        keep = 1.0
        if option.seed is not None:
            keep = keep_of(block, sizes.heads, first, first_key, option, shape.rows, shape.keys).T
        kept, _, grad = _gradients(
            tl.dot(k, q.T, input_precision=shape.precision), tl.dot(v, g.T, input_precision=shape.precision), keep,
            row[None, :], key, row_base, row_low, row_delta, block, option, shape, EDGES,
        )  # fmt: skip
        dv = tl.dot(kept.to(g.dtype), g, dv, input_precision=shape.precision)
        dk = tl.dot(grad.to(q.dtype), q, dk, input_precision=shape.precision)
    return dk, dv


@triton.jit
def _statistic(pointer, row, rows, other, EDGES: tl.constexpr):
    if EDGES:
        return tl.load(pointer + row, row < rows, other)[None, :]
    else:
        return tl.load(pointer + row)[None, :]


# ---- grad_query ------------------------------------------------------------------------------------------------------


@triton.jit
def rows_kernel(query, key, value, grad_output, grad_query, ends, base, low, delta, sizes, option, shape):
    tile, head, index = place(sizes.tiles, sizes.heads)
    batch, row0, rows, key0, keys = sequence_of(index, sizes, option)
    if option.cu_seqlens_q is not None:
        if index == sizes.sequences:
            zero_rows(grad_query, batch, head, row0, rows, tile, sizes.tiles, shape.rows, shape.head_dim, shape.depth)
            return
    first = (sizes.tiles - 1 - tile) * shape.rows
    if first >= rows:
        return

    block = (batch, head, index, rows, keys, shift_of(rows, keys, option))
    key_head = head // (sizes.heads // sizes.key_heads)
    keys_at, values_at = address(key, batch, key_head, key0), address(value, batch, key_head, key0)
    statistic = (batch * sizes.heads + head) * sizes.rows + row0
    statistic += first
    q, g, row_base, row_delta = open_rows(
        query, grad_output, batch, head, row0 + first, rows - first, base + statistic, delta + statistic, shape
    )
    row_low = None if low is None else column_of(low + statistic, rows - first, 0.0, shape)
    dq = tl.zeros([shape.rows, shape.depth], tl.float32)
    left, right = 0.0, 0.0
    if ends is not None:
        left, right = tl.zeros([shape.rows], tl.float32), tl.zeros([shape.rows], tl.float32)
    phases = key_phases(first, block, option, shape.rows, shape.keys)
    for edges in tl.static_range(2):
        dq, left, right = _add_keys(
            q, g, row_base, row_low, row_delta, dq, left, right, keys_at, key.row, values_at, value.row, first, phases,
            block, sizes.heads, option, shape, ends is not None, edges == 1,
        )  # fmt: skip
    store_rows(address(grad_query, batch, head, row0 + first), grad_query.row, rows - first, dq * option.scale,
               shape.head_dim)  # fmt: skip
    if ends is not None:
        at, tiles = (tl.cast(index, tl.int64) * sizes.heads + head) * sizes.tiles + tile, sizes.heads * sizes.tiles
        tl.store(ends + at, tl.sum(left))
        tl.store(ends + tl.cast(sizes.sequences, tl.int64) * tiles + at, tl.sum(right))


@triton.jit
def open_rows(query, grad_output, batch, head, row, count, base, delta, shape):
    """query, grad_output and the statistics, as columns, of the tile of rows that begins at `row`."""
    query_at, grad_at = address(query, batch, head, row), address(grad_output, batch, head, row)
    q = load_rows(query_at, query.row, count, shape.rows, shape.head_dim, shape.depth, True)
    g = load_rows(grad_at, grad_output.row, count, shape.rows, shape.value_dim, shape.width, True)
    # rows beyond the last: an infinite lse makes their probabilities 0
    return q, g, column_of(base, count, float("inf"), shape), column_of(delta, count, 0.0, shape)


@triton.jit
def column_of(pointer, count, other, shape):
    row = tl.arange(0, shape.rows)[:, None]
    return tl.load(pointer + row, row < count, other)


@triton.jit
def _add_keys(
    q, g, base, low, delta, dq, left, right, keys_at, key_stride, values_at, value_stride, first_row, phases, block,
    heads, option, shape, ENDS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """grad_query / scale with what the full tiles of keys add, or those at the edges; where ENDS, with the sums of
    each row's gradients of the logits at distances beyond both ends of the bias by distance."""
    row = (first_row + tl.arange(0, shape.rows))[:, None]
    start, stop = span(phases, EDGES)
    for position in tl.range(start, stop, shape.keys):
        first = skip(position, phases, EDGES)
        k, grad, grad_logits = scores(q, g, base, low, delta, keys_at, key_stride, values_at, value_stride, row,
                                      first_row, first, block, heads, option, shape, EDGES)  # fmt: skip
        dq = tl.dot(grad.to(k.dtype), k, dq, input_precision=shape.precision)
        if ENDS:
            distance = (first + tl.arange(0, shape.keys))[None, :] - (row + block[5])
            farthest = option.distances.farthest
            left += tl.sum(tl.where(distance <= -farthest, grad_logits, 0.0), 1)
            right += tl.sum(tl.where(distance >= tl.maximum(farthest, 1), grad_logits, 0.0), 1)
    return dq, left, right


@triton.jit
def scores(
    q, g, base, low, delta, keys_at, key_stride, values_at, value_stride, row, first_row, first, block, heads, option,
    shape, EDGES: tl.constexpr,
):  # fmt: skip
    """(keys, gradient of their products x scale, gradient of the logits) of the tile of keys that begins at `first`."""
    keys = block[4]
    key_at, value_at = (
        keys_at + tl.cast(first, tl.int64) * key_stride,
        values_at + tl.cast(first, tl.int64) * value_stride,
    )
    k = load_rows(key_at, key_stride, keys - first, shape.keys, shape.head_dim, shape.depth, EDGES)
    v = load_rows(value_at, value_stride, keys - first, shape.keys, shape.value_dim, shape.width, EDGES)
    key = (first + tl.arange(0, shape.keys))[None, :]
    keep = 1.0
    if option.seed is not None:
        keep = keep_of(block, heads, first_row, first, option, shape.rows, shape.keys)
    _, grad_logits, grad = _gradients(
        tl.dot(q, k.T, input_precision=shape.precision), tl.dot(g, v.T, input_precision=shape.precision), keep,
        row, key, base, low, delta, block, option, shape, EDGES,
    )  # fmt: skip
    return k, grad, grad_logits


# ---- grad_mask -------------------------------------------------------------------------------------------------------


@triton.jit
def mask_kernel(query, key, value, grad_output, grad_mask, base, low, delta, mask_sizes, sizes, option, shape):
    """grad_mask is contiguous; mask_sizes: its (batch, heads, rows), each 1 where it is broadcast."""
    mask_batch, mask_heads, mask_rows = mask_sizes
    key_tiles = tl.cdiv(sizes.keys, shape.keys)
    key_tile, row_tile, part = place(key_tiles, tl.cdiv(mask_rows, shape.rows))
    first, own_batch, own_head = key_tile * shape.keys, part // mask_heads, part % mask_heads
    # what shares the tile: its own batch entry, head or rows, or all of them
    batches = sizes.sequences if mask_batch == 1 else 1
    heads = sizes.heads if mask_heads == 1 else 1
    own_row = row_tile * shape.rows
    end_row = sizes.rows if mask_rows == 1 else own_row + 1
    total = tl.zeros([shape.rows, shape.keys], tl.float32)
    for index in range(own_batch, own_batch + batches):
        for head in range(own_head, own_head + heads):
            for first_row in range(own_row, end_row, shape.rows):
                total += _mask_tile(
                    query, key, value, grad_output, base, low, delta, index, head, first_row, first, sizes, option,
                    shape,
                )  # fmt: skip
    column = first + tl.arange(0, shape.keys)
    lines = grad_mask + tl.cast(part, tl.int64) * mask_rows * sizes.keys + column
    if mask_rows == 1:
        tl.store(lines, tl.sum(total, 0), column < sizes.keys)
    else:
        row = (own_row + tl.arange(0, shape.rows))[:, None]
        inside = (row < mask_rows) & (column < sizes.keys)[None, :]
        tl.store(lines[None, :] + tl.cast(row, tl.int64) * sizes.keys, total, inside)


@triton.jit
def _mask_tile(
    query, key, value, grad_output, base, low, delta, index, head, first_row, first_key, sizes, option, shape
):  # fmt: skip
    """The gradient of a tile of logits; rows beyond the last and keys that are not seen give 0."""
    batch, rows, keys = tl.cast(index, tl.int64), sizes.rows, sizes.keys
    block = (batch, head, index, rows, keys, shift_of(rows, keys, option))
    key_head = head // (sizes.heads // sizes.key_heads)
    statistic = (batch * sizes.heads + head) * rows + first_row
    q, g, row_base, row_delta = open_rows(
        query, grad_output, batch, head, first_row, rows - first_row, base + statistic, delta + statistic, shape
    )
    row_low = None if low is None else column_of(low + statistic, rows - first_row, 0.0, shape)
    zero = first_key * 0
    _, _, grad_logits = scores(
        q, g, row_base, row_low, row_delta, address(key, batch, key_head, zero), key.row,
        address(value, batch, key_head, zero), value.row, (first_row + tl.arange(0, shape.rows))[:, None], first_row,
        first_key, block, sizes.heads, option, shape, True,
    )  # fmt: skip
    return grad_logits
