"""The gradient of attention's bias by distance, between its ends (formulas: csrc/ops/attention.h).

Entry M + d, |d| < M, sums the gradients of the logits at distance d between key and row. Tiles of N rows and N keys
that lie on one diagonal, N apart either way, hold the same 2 N - 1 distances. A program owns such a diagonal of tiles
of one head and sequence, goes down it and adds the tiles up:

    scores(r, c) = gradients of a tile's logits, made again as in rows_kernel    4 N N head_dim flops
    turned(r, m) = scores(r, (r + m) mod N): column m holds distance m where r + m < N, and distance m - N elsewhere
    upper(m) += sum of the first kind,  lower(m) += sum of the second

and at the end writes both where no other program of the sequence writes: the two parts of `between`. No atomics: the
sums over sequences follow in a fixed order. What lies beyond the ends, most of a long sequence, is never visited: those
sums are rows_kernel's by the way. Limit: the turn, which goes through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmengine.backends.triton.attention_backward import column_of, open_rows, scores
from llmengine.backends.triton.attention_tile import address, place, sequence_of, shift_of


@triton.jit
def distance_kernel(query, key, value, grad_output, between, base, low, delta, sizes, option, shape):
    """between: contiguous (2, sequences, heads, 2 M - 1), zeros."""
    diagonal, head, index = place(sizes.tiles, sizes.heads)
    batch, row0, rows, key0, keys = sequence_of(index, sizes, option)
    shift = shift_of(rows, keys, option)
    farthest = option.distances.farthest
    # first key minus first row of the tiles, a multiple of N: that of the first program holds distance 1 - M as `upper`
    offset = ((shift - farthest + 1) & -shape.keys) + diagonal * shape.keys
    block = (batch, head, index, rows, keys, shift)
    upper = tl.zeros([shape.keys], tl.float32)
    lower = tl.zeros([shape.keys], tl.float32)
    start, stop = tl.maximum(-offset, 0), tl.minimum(rows, keys - offset)
    if option.left is not None:
        if offset - shift + shape.keys - 1 < -option.left:
            return
    if option.right is not None:
        if offset - shift - shape.keys + 1 > option.right:
            return
    for first_row in range(start, stop, shape.rows):
        above, below = _turned_sums(
            query, key, value, grad_output, base, low, delta, first_row, first_row + offset, row0, key0, block, sizes,
            option, shape,
        )  # fmt: skip
        upper += above
        lower += below
    width = 2 * farthest - 1
    at = between + (tl.cast(index, tl.int64) * sizes.heads + head) * width
    entry = offset - shift + farthest - 1 + tl.arange(0, shape.keys)
    tl.store(at + entry, upper, (entry >= 0) & (entry < width))
    entry -= shape.keys
    at += tl.cast(sizes.sequences, tl.int64) * sizes.heads * width
    tl.store(at + entry, lower, (entry >= 0) & (entry < width))


@triton.jit
def _turned_sums(
    query, key, value, grad_output, base, low, delta, first_row, first_key, row0, key0, block, sizes, option, shape
):  # fmt: skip
    """A tile's sums at the distances m and m - N beside that of its corner."""
    batch, head, _, rows, _, _ = block
    key_head = head // (sizes.heads // sizes.key_heads)
    statistic = (batch * sizes.heads + head) * sizes.rows + row0 + first_row
    q, g, row_base, row_delta = open_rows(
        query, grad_output, batch, head, row0 + first_row, rows - first_row, base + statistic, delta + statistic, shape
    )
    row_low = None if low is None else column_of(low + statistic, rows - first_row, 0.0, shape)
    lane, turn = tl.arange(0, shape.rows)[:, None], tl.arange(0, shape.keys)[None, :]
    _, _, grad = scores(
        q, g, row_base, row_low, row_delta, address(key, batch, key_head, key0), key.row,
        address(value, batch, key_head, key0), value.row, first_row + lane, first_row, first_key, block, sizes.heads,
        option, shape, True,
    )  # fmt: skip
    turned = tl.gather(grad, (lane + turn) % shape.keys, 1)
    above = lane + turn < shape.keys
    return tl.sum(tl.where(above, turned, 0.0), 0), tl.sum(tl.where(above, 0.0, turned), 0)
