"""Dropout multipliers from the engine's generator, Philox 4x32-10 (csrc/ops/philox.h): the same elements are dropped
as by every other backend.

    key = the seed, counter = (row >> 32, stream, row, column / 4), lane = column mod 4
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_multipliers(seed_pointer, threshold, keep_scale, stream, rows, column_groups):
    """0 where an element is dropped, keep_scale elsewhere: a float32 tile (len(rows), 4 len(column_groups)).

    rows int64 (R,); column_groups (G,): column / 4 of each group of four columns. threshold: draws below it, uint32,
    are dropped. keep_scale: 1 / (1 - p).
    """
    seed = tl.load(seed_pointer).to(tl.uint64, bitcast=True)
    draws = random_words(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), stream, rows, column_groups)
    return tl.where(draws < threshold, 0.0, keep_scale)


@triton.jit
def random_words(key0, key1, stream, rows, column_groups):
    """uint32 tile (len(rows), 4 len(column_groups)): one Philox call gives a group of four columns its draws."""
    zero = tl.zeros([rows.shape[0], column_groups.shape[0]], tl.uint32)
    c0 = (rows >> 32).to(tl.uint32)[:, None] + zero
    c1 = stream + zero
    c2 = rows.to(tl.uint32)[:, None] + zero
    c3 = column_groups.to(tl.uint32)[None, :] + zero
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, c3, key0, key1, 10)
    # join's new last axis is the fast one: ((w0, w2), (w1, w3)) read along the last two axes is w0 w1 w2 w3
    draws = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(draws, [rows.shape[0], 4 * column_groups.shape[0]])
