"""Products with a matrix of which whole tiles are zeros: these are neither read nor multiplied.

Which tiles hold anything is known on the device alone, so a small kernel lists, for each row of the result's tiles, the
k-steps whose tiles of the left operand hold something, in order; a program of the product walks down the list of its
row. 2 M N flops for every k that is listed; equal bits at every run. Otherwise as gemm.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import precision
from llmengine.backends.triton.gemm import Between, store_sums, stored_sums, tile_place
from llmengine.backends.triton.tiles import pick

# K-steps that the listing program looks at at a time.
STRIP = 256


class Kept(NamedTuple):
    """flags (tiles down, tiles across), int32: 1 where a tile of m x n elements of a matrix holds anything."""

    flags: torch.Tensor
    m: int
    n: int

    @property
    def T(self) -> Kept:
        return Kept(self.flags.T, self.n, self.m)


@triton.jit
def _list_steps(
    flags, steps, counts, down, across, flags_m, flags_k, most,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    written = 0
    for start in range(0, most, STRIP):
        step = start + tl.arange(0, STRIP)
        holds = tl.zeros([STRIP], tl.int32)
        for i in tl.static_range((BLOCK_M + TILE_M - 1) // TILE_M):
            for j in tl.static_range((BLOCK_K + TILE_K - 1) // TILE_K):
                m = tl.minimum(row * BLOCK_M // TILE_M + i, down - 1)  # past the last: the last once more
                k = tl.minimum(step * BLOCK_K // TILE_K + j, across - 1)
                holds |= tl.load(flags + m * flags_m + k * flags_k, step < most, 0)
        place = written + tl.cumsum(holds, 0) - holds
        tl.store(steps + row.to(tl.int64) * most + place, step, holds != 0)
        written += tl.sum(holds, 0)
    tl.store(counts + row, written)


@triton.jit
def _product(
    a, b, steps, counts, c, low, M, N, K, most, a_m, a_k, b_k, b_n, c_m,
    ADDED: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tile_place(M, N, BLOCK_M, BLOCK_N, GROUP)
    m = row + tl.arange(0, BLOCK_M).to(tl.int64)
    n = column + tl.arange(0, BLOCK_N).to(tl.int64)
    own = row // BLOCK_M
    count = tl.load(counts + own)
    listed = steps + own.to(tl.int64) * most
    step = tl.load(listed, count > 0, 0)  # of the next turn, so that its tiles can be on their way
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, count):
        k = step.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside_a, inside_b = (m < M)[:, None], (n < N)[None, :]
        if not EVEN:
            inside_a &= (k < K)[None, :]
            inside_b &= (k < K)[:, None]
        x = tl.load(a + m[:, None] * a_m + k[None, :] * a_k, inside_a, 0.0)
        y = tl.load(b + k[:, None] * b_k + n[None, :] * b_n, inside_b, 0.0)
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
        step = tl.load(listed + i + 1, i + 1 < count, 0)
    at = m[:, None] * c_m + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADDED:
        sums += stored_sums(c, low, at, inside)
    store_sums(sums, c, low, at, inside, LAST)


def block_sparse_gemm(a, kept: Kept, b, *, out, added=False, between: Between | None = None):
    """a b into `out`; kept: of a, tiles with sides that are powers of two. added, between: as gemm's."""
    (M, K), N = a.shape, b.shape[1]
    if not out.numel():
        return out
    tile = pick("fused" if added or between else "plain", a, b)
    rows, most = -(-M // tile.m), -(-K // tile.k)
    steps = kept.flags.new_empty(rows, most)
    counts = kept.flags.new_empty(rows)
    _list_steps[(rows,)](
        kept.flags, steps, counts, *kept.flags.shape, *kept.flags.stride(), most, kept.m, kept.n, tile.m, tile.k, STRIP
    )
    _product[(tile.programs(M, N),)](
        a, b, steps, counts, out, between and between.low, M, N, K, most, *a.stride(), *b.stride(), out.stride(0),
        added, between is None or between.last, EVEN=K % tile.k == 0, PRECISION=precision(a.dtype, a.device),
        **tile.constants(),
    )  # fmt: skip
    return out
