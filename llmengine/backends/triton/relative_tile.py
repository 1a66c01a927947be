"""What the kernels of relative attention share: positions, segments, and who sees whom (formulas:
csrc/ops/relative_attention.h; sequences, tiles and dropout: attention_tile.py).

A tile of scores needs, of each row i, its products with the distances p_i - j of the tile's keys j. They are made a
block of distances at a time, on the tensor cores, and read along diagonals by a gather within the block:

                distances ->                            score(i, j) += block[i, p_i - j - first]
         row 0  . . x x x x
         row 1  . x x x x .     rows that follow each other: keys + rows distances, two or three blocks a tile;
         row 2  x x x x . .     rows at any positions: as many blocks as they span, whatever their order

Nothing is shifted or copied. The way back from scores to distances is a gather too: of row i, distance d is key
p_i - d.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llmengine.backends.triton.attention_tile import Rows, address, keep_of, load_rows


class Relative(NamedTuple):
    """None switches an option off, and its code with it. The first fields are those that attention's Options has."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seed: Tensor | None
    threshold: int
    keep_scale: float
    position_key: Rows  # (1, heads, distances, head_dim)
    distances: int
    zero_distance: int
    segment_scores: Tensor | None  # float32 (rows, heads, 2)
    query_segments: Tensor | None
    key_segments: Tensor | None
    query_positions: Tensor | None
    query_ranks: Tensor | None
    key_ranks: Tensor | None
    causal: tl.constexpr
    include_self: tl.constexpr
    scale: float


@triton.jit
def positions_of(first, row0, rows, keys, option, ROWS: tl.constexpr):
    """Of the rows from `first` on; those beyond the last are like it."""
    row = tl.minimum(first + tl.arange(0, ROWS), rows - 1)
    if option.query_positions is None:
        position = row + keys - rows
    else:
        position = tl.load(option.query_positions + row0 + row)
    if option.causal:  # before all keys a row sees none, wherever it stands
        position = tl.maximum(position, -1)
    return position


@triton.jit
def load_distances(head, first, option, DISTANCES: tl.constexpr, shape):
    """The position keys of the distances from `first` on. Those that position_key does not cover are NaN, which only
    shows in a score that is seen: a GPU cannot refuse them."""
    place = first + option.zero_distance + tl.arange(0, DISTANCES)[:, None]
    column = tl.arange(0, shape.depth)[None, :]
    pointers = address(option.position_key, 0, head, 0) + tl.cast(place, tl.int64) * option.position_key.row + column
    covered = (place >= 0) & (place < option.distances)
    r = tl.load(pointers, covered & (column < shape.head_dim), 0.0)
    return r, covered


@triton.jit
def _block_index(position, key, first, DISTANCES: tl.constexpr):
    """(index in a block of distances from `first` on, whether it lies there), of scores (rows, keys)."""
    index = position - key - first
    inside = (index >= 0) & (index < DISTANCES)
    return tl.where(inside, index, 0), inside


@triton.jit
def distance_span(position, first_key, KEYS: tl.constexpr):
    """The first and last distance of a tile of scores."""
    return tl.min(position) - (first_key + KEYS - 1), tl.max(position) - first_key


@triton.jit
def position_scores(pq, position, first_key, head, option, shape):
    """(rows, keys) products of position_query with the position keys of the scores' distances."""
    key = (first_key + tl.arange(0, shape.keys))[None, :]
    scores = tl.zeros([shape.rows, shape.keys], tl.float32)
    least, most = distance_span(position, first_key, shape.keys)
    for first in tl.range(least, most + 1, shape.keys):
        r, covered = load_distances(head, first, option, shape.keys, shape)
        products = tl.dot(pq, r.T, input_precision=shape.precision)
        products = tl.where(covered.T, products, float("nan"))
        index, inside = _block_index(position[:, None], key, first, shape.keys)
        scores += tl.where(inside, tl.gather(products, index, 1), 0.0)
    return scores


@triton.jit
def seen_logits(products, position, row, key, row0, rows, key0, keys, head, heads, option):
    """Logits of the products, -inf where a key is not seen. position and row: (rows, 1); key broadcasts to them."""
    at, inside = row0 + tl.minimum(row, rows - 1), (key >= 0) & (key < keys)
    if option.segment_scores is not None:
        score_at = option.segment_scores + (tl.cast(at, tl.int64) * heads + head) * 2
        own = tl.load(option.query_segments + at) == tl.load(option.key_segments + key0 + key, inside, 0)
        products += tl.where(own, tl.load(score_at), tl.load(score_at + 1))
    seen = inside
    if option.key_ranks is not None:
        allowed = tl.load(option.key_ranks + key0 + key, inside, 0) < tl.load(option.query_ranks + at)
        if option.include_self:
            allowed |= key == position
        seen &= allowed
    if option.causal:
        seen &= key <= position
    return tl.where(seen, products * option.scale, -float("inf"))


@triton.jit
def last_key(position, keys, option):
    """Beyond the last key that rows at these positions may see."""
    if option.causal:
        return tl.minimum(tl.max(position) + 1, keys)
    else:
        return keys


@triton.jit
def keep_at(head, index, heads, first_row, first_key, option, shape):
    block = (0, head, index, 0, 0, 0)
    return keep_of(block, heads, first_row, first_key, option, shape.rows, shape.keys)


@triton.jit
def open_tile(x, head, row, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    return load_rows(address(x, 0, head, row), x.row, count, ROWS, COLUMNS, WIDTH, True)
