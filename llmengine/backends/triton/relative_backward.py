"""Relative attention, backward: probabilities are made again from lse, tile by tile (relative_tile.py; delta and lse
by attention's statistics_kernel).

    rows_kernel        a program owns a tile of query rows of one head: the gradients of query, position_query and the
                       segment scores; keys stream by
    keys_kernel        a program owns a tile of keys of one head: grad_key and grad_value; rows stream by
    distances_kernel   a program owns a block of distances of one head: grad_position_key; the rows of all sequences
                       stream by. It works in the space (rows, distances), where position scores lie straight, and
                       content scores are gathered: of row i, distance d is key p_i - d

Every sum is made by one program in a fixed order: no atomics, equal bits in every run; the price is that scores are
made three times. Limit: the tensor cores, and the gathers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmengine.backends.triton.attention_tile import address, place, sequence_of, store_rows, zero_rows
from llmengine.backends.triton.relative_tile import (
    distance_span,
    keep_at,
    last_key,
    load_distances,
    open_tile,
    position_scores,
    positions_of,
    seen_logits,
)


@triton.jit
def _column(pointer, count, other, shape):
    row = tl.arange(0, shape.rows)[:, None]
    return tl.load(pointer + row, row < count, other)


@triton.jit
def _open_rows(query, position_query, grad_output, base, low, delta, head, row0, first, rows, sizes, shape):
    """The operands of the tile of rows from `first` on, and the statistics as columns."""
    count = rows - first
    q = open_tile(query, head, row0 + first, count, shape.rows, shape.head_dim, shape.depth)
    pq = open_tile(position_query, head, row0 + first, count, shape.rows, shape.head_dim, shape.depth)
    g = open_tile(grad_output, head, row0 + first, count, shape.rows, shape.value_dim, shape.width)
    statistic = tl.cast(head, tl.int64) * sizes.rows + row0 + first
    # rows beyond the last: an infinite lse makes their probabilities 0
    return (
        q, pq, g, _column(base + statistic, count, float("inf"), shape), _column(low + statistic, count, 0.0, shape),
        _column(delta + statistic, count, 0.0, shape),
    )  # fmt: skip


@triton.jit
def _tile(opened, position, first, first_key, key, value, head, index, row0, rows, key0, keys, sizes, option, shape):
    """(k, P keep, gradient of the logits) of a tile of scores."""
    q, pq, g, base, low, delta = opened
    k = open_tile(key, head, key0 + first_key, keys - first_key, shape.keys, shape.head_dim, shape.depth)
    v = open_tile(value, head, key0 + first_key, keys - first_key, shape.keys, shape.value_dim, shape.width)
    products = tl.dot(q, k.T, input_precision=shape.precision)
    products += position_scores(pq, position, first_key, head, option, shape)
    row = (first + tl.arange(0, shape.rows))[:, None]
    column = (first_key + tl.arange(0, shape.keys))[None, :]
    logits = seen_logits(products, position[:, None], row, column, row0, rows, key0, keys, head, sizes.heads, option)
    p = tl.exp((logits - base) - low)
    grad_p = tl.dot(g, v.T, input_precision=shape.precision)
    kept = p
    if option.seed is not None:
        keep = keep_at(head, index, sizes.heads, first, first_key, option, shape)
        kept, grad_p = p * keep, grad_p * keep
    return k, kept, p * (grad_p - delta)


# ---- query, position_query, segment scores ---------------------------------------------------------------------------


@triton.jit
def rows_kernel(
    query, position_query, key, value, grad_output, grad_query, grad_position_query, grad_segments, grad_lse, base,
    low, delta, sizes, option, shape,
):  # fmt: skip
    tile, head, index = place(sizes.tiles, sizes.heads)
    batch, row0, rows, key0, keys = sequence_of(index, sizes, option)
    if index == sizes.sequences:
        for out in tl.static_range(2):
            to = grad_query if out == 0 else grad_position_query
            zero_rows(to, batch, head, row0, rows, tile, sizes.tiles, shape.rows, shape.head_dim, shape.depth)
        return
    first = (sizes.tiles - 1 - tile) * shape.rows
    if first >= rows:
        return

    opened = _open_rows(query, position_query, grad_output, base, low, delta, head, row0, first, rows, sizes, shape)
    position = positions_of(first, row0, rows, keys, option, shape.rows)
    dq = tl.zeros([shape.rows, shape.depth], tl.float32)
    dpq = tl.zeros([shape.rows, shape.depth], tl.float32)
    segments = tl.zeros([4, shape.rows], tl.float32)
    for first_key in tl.range(0, last_key(position, keys, option), shape.keys):
        k, kept, grad = _tile(
            opened, position, first, first_key, key, value, head, index, row0, rows, key0, keys, sizes, option, shape
        )
        dq = tl.dot(grad.to(k.dtype), k, dq, input_precision=shape.precision)
        dpq = _add_distances(dpq, grad.to(k.dtype), position, first_key, head, option, shape)
        if option.segment_scores is not None:
            segments += _segment_sums(kept, grad, first, first_key, row0, rows, key0, keys, option, shape)
    count = rows - first
    store_rows(address(grad_query, batch, head, row0 + first), grad_query.row, count, dq * option.scale,
               shape.head_dim)  # fmt: skip
    store_rows(address(grad_position_query, batch, head, row0 + first), grad_position_query.row, count,
               dpq * option.scale, shape.head_dim)  # fmt: skip
    if option.segment_scores is not None:
        _store_segments(segments, grad_segments, grad_lse, head, row0 + first, count, sizes, option, shape)


@triton.jit
def _add_distances(dpq, grad, position, first_key, head, option, shape):
    """grad_position_query / scale with what a tile of gradients of scores adds, a block of distances at a time."""
    least, most = distance_span(position, first_key, shape.keys)
    for first in tl.range(least, most + 1, shape.keys):
        r = load_distances(head, first, option, shape.keys, shape)[0]
        index = position[:, None] - (first + tl.arange(0, shape.keys))[None, :] - first_key
        inside = (index >= 0) & (index < shape.keys)
        of_distances = tl.where(inside, tl.gather(grad, tl.where(inside, index, 0), 1), 0.0)
        dpq = tl.dot(of_distances.to(r.dtype), r, dpq, input_precision=shape.precision)
    return dpq


@triton.jit
def _segment_sums(kept, grad, first, first_key, row0, rows, key0, keys, option, shape):
    """(4, rows): the gradients over keys of the own segment and of others, and the probabilities."""
    at = row0 + tl.minimum(first + tl.arange(0, shape.rows), rows - 1)
    column = first_key + tl.arange(0, shape.keys)
    of_keys = tl.load(option.key_segments + key0 + column, column < keys, 0)
    own = tl.load(option.query_segments + at)[:, None] == of_keys[None, :]
    line = tl.arange(0, 4)[:, None]
    sums = tl.where(line == 0, tl.sum(tl.where(own, grad, 0.0), 1)[None, :], 0.0)
    sums = tl.where(line == 1, tl.sum(tl.where(own, 0.0, grad), 1)[None, :], sums)
    sums = tl.where(line == 2, tl.sum(tl.where(own, kept, 0.0), 1)[None, :], sums)
    return tl.where(line == 3, tl.sum(tl.where(own, 0.0, kept), 1)[None, :], sums)


@triton.jit
def _store_segments(segments, grad_segments, grad_lse, head, row, count, sizes, option, shape):
    """The gradients of a row's logits add up to grad_lse. What they miss of it is the rounding of delta, which each
    took with it in proportion to its probability, and is given back."""
    line, lane = tl.arange(0, 4)[:, None], tl.arange(0, shape.rows)
    same, other = tl.sum(tl.where(line == 0, segments, 0.0), 0), tl.sum(tl.where(line == 1, segments, 0.0), 0)
    p_same, p_other = tl.sum(tl.where(line == 2, segments, 0.0), 0), tl.sum(tl.where(line == 3, segments, 0.0), 0)
    whole = tl.zeros([shape.rows], tl.float32)
    if grad_lse is not None:
        whole = tl.load(grad_lse + tl.cast(head, tl.int64) * sizes.rows + row + lane, lane < count, 0.0)
    p = p_same + p_other
    missing = tl.where(p > 0.0, whole - (same + other), 0.0)
    share = missing * (p_same / tl.where(p > 0.0, p, 1.0))
    out = grad_segments + (tl.cast(row + lane, tl.int64) * sizes.heads + head) * 2
    tl.store(out, (same + share) * option.scale, lane < count)
    tl.store(out + 1, (other + (missing - share)) * option.scale, lane < count)


# ---- key, value ------------------------------------------------------------------------------------------------------


@triton.jit
def keys_kernel(
    query, position_query, key, value, grad_output, grad_key, grad_value, base, low, delta, sizes, option, shape
):
    tile, head, index = place(sizes.tiles, sizes.heads)
    batch, row0, rows, key0, keys = sequence_of(index, sizes, option)
    if index == sizes.sequences:
        zero_rows(grad_key, batch, head, key0, keys, tile, sizes.tiles, shape.keys, shape.head_dim, shape.depth)
        zero_rows(grad_value, batch, head, key0, keys, tile, sizes.tiles, shape.keys, shape.value_dim, shape.width)
        return
    first_key = tile * shape.keys
    if first_key >= keys:
        return

    dk = tl.zeros([shape.keys, shape.depth], tl.float32)
    dv = tl.zeros([shape.keys, shape.width], tl.float32)
    for first in tl.range(0, rows, shape.rows):
        position = positions_of(first, row0, rows, keys, option, shape.rows)
        if first_key < last_key(position, keys, option):
            opened = _open_rows(
                query, position_query, grad_output, base, low, delta, head, row0, first, rows, sizes, shape
            )
            _, kept, grad = _tile(
                opened, position, first, first_key, key, value, head, index, row0, rows, key0, keys, sizes, option,
                shape,
            )  # fmt: skip
            dv = tl.dot(kept.to(opened[2].dtype).T, opened[2], dv, input_precision=shape.precision)
            dk = tl.dot(grad.to(opened[0].dtype).T, opened[0], dk, input_precision=shape.precision)
    count = keys - first_key
    store_rows(address(grad_key, batch, head, key0 + first_key), grad_key.row, count, dk * option.scale,
               shape.head_dim)  # fmt: skip
    store_rows(address(grad_value, batch, head, key0 + first_key), grad_value.row, count, dv, shape.value_dim)


# ---- position_key ----------------------------------------------------------------------------------------------------


@triton.jit
def distances_kernel(
    query, position_query, key, value, grad_output, grad_position_key, base, low, delta, sizes, option, shape
):
    """A block has shape.keys distances."""
    block, head = tl.program_id(0) % sizes.tiles, tl.program_id(0) // sizes.tiles
    first_distance = block * shape.keys - option.zero_distance
    r = load_distances(head, first_distance, option, shape.keys, shape)[0]
    dr = tl.zeros([shape.keys, shape.depth], tl.float32)
    for index in range(0, sizes.sequences):
        _, row0, rows, key0, keys = sequence_of(index, sizes, option)
        for first in tl.range(0, rows, shape.rows):
            position = positions_of(first, row0, rows, keys, option, shape.rows)
            # the keys that stand at these distances from these rows
            begin = tl.maximum(tl.min(position) - (first_distance + shape.keys - 1), 0) // 4 * 4
            end = tl.minimum(tl.max(position) - first_distance + 1, last_key(position, keys, option))
            if begin < end:
                opened = _open_rows(
                    query, position_query, grad_output, base, low, delta, head, row0, first, rows, sizes, shape
                )
                grad = _distance_tile(
                    opened, r, position, first, first_distance, begin, end, key, value, head, index, row0, rows, key0,
                    keys, sizes, option, shape,
                )  # fmt: skip
                dr = tl.dot(grad.to(r.dtype).T, opened[1], dr, input_precision=shape.precision)
    to = address(grad_position_key, 0, head, block * shape.keys)
    store_rows(to, grad_position_key.row, option.distances - block * shape.keys, dr * option.scale, shape.head_dim)


@triton.jit
def _distance_tile(
    opened, r, position, first, first_distance, begin, end, key, value, head, index, row0, rows, key0, keys, sizes,
    option, shape,
):  # fmt: skip
    """The gradients of the logits of a tile (rows, distances), each that of key p_i - d."""
    q, pq, g, base, low, delta = opened
    products = tl.dot(pq, r.T, input_precision=shape.precision)
    grad_p = tl.zeros([shape.rows, shape.keys], tl.float32)
    own_key = position[:, None] - (first_distance + tl.arange(0, shape.keys))[None, :]
    for first_key in tl.range(begin, end, shape.keys):
        k = open_tile(key, head, key0 + first_key, keys - first_key, shape.keys, shape.head_dim, shape.depth)
        v = open_tile(value, head, key0 + first_key, keys - first_key, shape.keys, shape.value_dim, shape.width)
        of_keys = tl.dot(g, v.T, input_precision=shape.precision)
        if option.seed is not None:
            of_keys *= keep_at(head, index, sizes.heads, first, first_key, option, shape)
        place = own_key - first_key
        inside = (place >= 0) & (place < shape.keys)
        place = tl.where(inside, place, 0)
        content = tl.dot(q, k.T, input_precision=shape.precision)
        products += tl.where(inside, tl.gather(content, place, 1), 0.0)
        grad_p += tl.where(inside, tl.gather(of_keys, place, 1), 0.0)
    row = (first + tl.arange(0, shape.rows))[:, None]
    logits = seen_logits(products, position[:, None], row, own_key, row0, rows, key0, keys, head, sizes.heads, option)
    p = tl.exp((logits - base) - low)
    return p * (grad_p - delta)
