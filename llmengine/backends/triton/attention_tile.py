"""What the attention kernels share: where a program's sequence, rows and keys lie, which keys its rows see
(csrc/ops/attention_band.h), and what stands between query key^T and the probabilities (csrc/ops/attention.h).

Row and key indices count within the sequence, in 32 bits; addresses are made in 64. Elementwise functions take the
indices as (R, 1) and (1, K), or as (1, R) and (K, 1) for a transposed tile, and let them broadcast.

The GPU's exponential is exp2. Where the logits are positive multiples of the products and need no float32 accuracy
(`fold`), they stay products, and maxima and lse are kept in units of log 2: exp2(products factor - maximum) is one
multiply-add before the exponential. Elsewhere logits are natural and exp multiplies a difference, which is small,
where the other form rounds a multiple of the logit, which need not be.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llmengine.backends.triton.maths import tanh
from llmengine.backends.triton.philox import keep_multipliers

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """A (batch, heads, rows, columns) tensor whose columns lie side by side: its memory and the other strides."""

    data: Tensor
    batch: int
    head: int
    row: int


class Mask(NamedTuple):
    """Its memory and strides; None along what it is broadcast along, so that it is read once for all of it."""

    data: Tensor
    batch: int | None
    head: int | None
    row: int | None
    key: int | None


class Distances(NamedTuple):
    """A bias by distance, contiguous (heads, 2 farthest + 1) float32."""

    data: Tensor
    farthest: int


class Shape(NamedTuple):
    """Of a program's tiles, all compile-time constants. depth and width: head_dim and value_dim, padded."""

    rows: tl.constexpr
    keys: tl.constexpr
    head_dim: tl.constexpr
    depth: tl.constexpr
    value_dim: tl.constexpr
    width: tl.constexpr
    precision: tl.constexpr  # of products of float32
    fold: tl.constexpr


class Sizes(NamedTuple):
    """Of the call. tiles: of the longest sequence; rows and keys: of the tensors; sequences: batch entries, or packed.

    Tokens after the last boundary of packed sequences are sequence number `sequences`, whose rows see no key.
    """

    tiles: int
    heads: int
    key_heads: int
    sequences: int
    rows: int
    keys: int


class Options(NamedTuple):
    """None switches an option off, and its code with it. factor: scale / log 2; cap: the soft cap."""

    mask: Mask | None
    slopes: Rows | None
    distances: Distances | None
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: Tensor | None
    threshold: int
    keep_scale: float
    left: int | None
    right: int | None
    bottom_right: int
    scale: float
    factor: float
    cap: float | None


# ---- place -----------------------------------------------------------------------------------------------------------


@triton.jit
def place(tiles, heads):
    """(tile, head, sequence) of the program. The tiles of a head run side by side and share its keys in the cache."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % heads, program // tiles // heads


@triton.jit
def sequence_of(index, sizes, option):
    """(batch entry, first row, rows, first key, keys) of a sequence."""
    if option.cu_seqlens_q is None:
        zero = index * 0
        return tl.cast(index, tl.int64), zero, zero + sizes.rows, zero, zero + sizes.keys
    else:
        row, rows = _cut(option.cu_seqlens_q, index, sizes.sequences, sizes.rows)
        key, keys = _cut(option.cu_seqlens_k, index, sizes.sequences, sizes.keys)
        return tl.cast(index * 0, tl.int64), row, rows, key, keys


@triton.jit
def _cut(cu_seqlens, index, sequences, tokens):
    """(first token, tokens) of a packed sequence. Wrong boundaries are clamped: a GPU cannot refuse them."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + index), 0), tokens)
    end = tl.load(cu_seqlens + index + 1, index < sequences, tokens)
    return begin, tl.minimum(tl.maximum(end, begin), tokens) - begin


@triton.jit
def address(x, batch, head, row):
    return x.data + batch * x.batch + tl.cast(head, tl.int64) * x.head + tl.cast(row, tl.int64) * x.row


@triton.jit
def load_rows(pointer, stride, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
              BOUNDED: tl.constexpr):  # fmt: skip
    """A (ROWS, WIDTH) tile: zeros beyond COLUMNS and, where BOUNDED, beyond `count` rows."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    pointers = pointer + tl.cast(row, tl.int64) * stride + column
    if BOUNDED:
        return tl.load(pointers, (row < count) & (column < COLUMNS), 0.0)
    elif COLUMNS < WIDTH:
        return tl.load(pointers, column < COLUMNS, 0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(pointer, stride, count, tile, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    pointers = pointer + tl.cast(row, tl.int64) * stride + column
    tl.store(pointers, tile.to(pointer.dtype.element_ty), (row < count) & (column < COLUMNS))


@triton.jit
def zero_rows(x, batch, head, row0, rows, tile, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's part of the rows that belong to no sequence: every `tiles`-th tile from `tile` on."""
    for first in range(tile * ROWS, rows, tiles * ROWS):
        zeros = tl.zeros([ROWS, WIDTH], tl.float32)
        store_rows(address(x, batch, head, row0 + first), x.row, rows - first, zeros, COLUMNS)


# ---- who sees whom ---------------------------------------------------------------------------------------------------


@triton.jit
def shift_of(rows, keys, option):
    """Row i stands at position i + shift among the keys."""
    return (keys - rows) * option.bottom_right


@triton.jit
def key_phases(first, block, option, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The keys that rows first ... first + ROWS - 1 see, in tiles of KEYS: (begin, full, tail, end).

    Tiles from `full` to `tail` are seen by all of these rows; in those before and after, the edges, every score is
    checked. Loops go through either kind by `span` and `skip`.
    """
    _, _, _, rows, keys, shift = block
    last = tl.minimum(first + ROWS, rows) - 1
    begin, full, tail, end = keys * 0, keys * 0, keys, keys
    if option.left is not None:
        begin = _clamp(first + shift - option.left, keys) // KEYS * KEYS
        full = tl.cdiv(_clamp(last + shift - option.left, keys), KEYS) * KEYS
    if option.right is not None:
        tail = _clamp(first + shift + option.right + 1, keys)
        end = _clamp(last + shift + option.right + 1, keys)
    full = tl.minimum(full, end)
    return begin, full, tl.maximum(tail // KEYS * KEYS, full), end


@triton.jit
def row_phases(first, block, option, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The rows that see keys first ... first + KEYS - 1, as `key_phases`."""
    _, _, _, rows, keys, shift = block
    last = tl.minimum(first + KEYS, keys) - 1
    begin, full, tail, end = rows * 0, rows * 0, rows, rows
    if option.right is not None:
        begin = _clamp(first - shift - option.right, rows) // ROWS * ROWS
        full = tl.cdiv(_clamp(last - shift - option.right, rows), ROWS) * ROWS
    if option.left is not None:
        tail = _clamp(first - shift + option.left + 1, rows)
        end = _clamp(last - shift + option.left + 1, rows)
    full = tl.minimum(full, end)
    return begin, full, tl.maximum(tail // ROWS * ROWS, full), end


@triton.jit
def span(phases, EDGES: tl.constexpr):
    """(start, stop) of a loop through the edges, as though the full tiles were not there, or through the full tiles."""
    begin, full, tail, end = phases
    if EDGES:
        return begin, end - (tail - full)
    else:
        return full, tail


@triton.jit
def skip(position, phases, EDGES: tl.constexpr):
    """The first key, or row, of the tile at that position of the loop."""
    _, full, tail, _ = phases
    if EDGES:
        return tl.where(position < full, position, position + (tail - full))
    else:
        return position


@triton.jit
def _clamp(x, most):
    return tl.minimum(tl.maximum(x, 0), most)


# ---- logits ----------------------------------------------------------------------------------------------------------


@triton.jit
def logits_of(products, row, key, block, option, FOLD: tl.constexpr, EDGES: tl.constexpr):
    """(logits, or products where FOLD; slope of the soft cap). -inf where a key is not seen."""
    _, head, index, _, keys, shift = block
    logits, slope = products, 1.0
    if not FOLD:
        logits = products * option.scale
        if option.cap is not None:
            t = tanh(logits / option.cap)
            logits, slope = t * option.cap, 1.0 - t * t
        if option.slopes is not None:
            steepness = tl.load(address(option.slopes, tl.cast(index, tl.int64), head, index * 0))
            logits -= steepness * tl.abs(key - (row + shift)).to(tl.float32)
        if option.distances is not None:
            logits = _biased(logits, _by_distance(option.distances, head, key - (row + shift)))
        if option.mask is not None:
            logits = _masked(logits, option.mask, row, key, block)
    if EDGES:
        seen = key < keys
        if option.left is not None:
            seen &= key >= row + (shift - option.left)
        if option.right is not None:
            seen &= key <= row + (shift + option.right)
        logits = tl.where(seen, logits, -float("inf"))
    return logits, slope


@triton.jit
def exponential(logits, base, option, FOLD: tl.constexpr):
    """exp(logits - base), base in units of log 2 where FOLD."""
    if FOLD:
        return tl.exp2(logits * option.factor - base)
    else:
        return tl.exp(logits - base)


@triton.jit
def _masked(logits, mask, row, key, block):
    batch, head, _, rows, keys, _ = block
    pointers = mask.data
    if mask.batch is not None:
        pointers += batch * mask.batch
    if mask.head is not None:
        pointers += tl.cast(head, tl.int64) * mask.head
    if mask.row is not None and mask.key is not None:
        pointers += tl.cast(row, tl.int64) * mask.row + tl.cast(key, tl.int64) * mask.key
        found = tl.load(pointers, (row < rows) & (key < keys))
    elif mask.row is not None:
        found = tl.load(pointers + tl.cast(row, tl.int64) * mask.row, row < rows)
    elif mask.key is not None:
        found = tl.load(pointers + tl.cast(key, tl.int64) * mask.key, key < keys)
    else:
        found = tl.load(pointers)
    if mask.data.dtype.element_ty == tl.int1:
        return tl.where(found, logits, -float("inf"))
    else:
        return _biased(logits, found.to(tl.float32))


@triton.jit
def _by_distance(distances, head, distance):
    # Every thread looks its scores up, in a table that stays in the first-level cache.
    farthest = distances.farthest
    entry = tl.minimum(tl.maximum(distance, -farthest), farthest) + farthest
    return tl.load(distances.data + tl.cast(head, tl.int64) * (2 * farthest + 1) + entry)


@triton.jit
def _biased(logits, bias):
    # a key whose bias is -inf is not seen, whatever its score: NaN in padding stays there
    return tl.where(bias == -float("inf"), bias, logits + bias)


@triton.jit
def keep_of(block, heads, first_row, first_key, option, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The (ROWS, KEYS) dropout multipliers of a tile; its first key is a multiple of 4."""
    _, head, index, _, _, _ = block
    stream = tl.cast(index * heads + head, tl.uint32)
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    groups = first_key // 4 + tl.arange(0, KEYS // 4)
    return keep_multipliers(option.seed, option.threshold, option.keep_scale, stream, rows, groups)
