"""Matrix products, alone and as the core of fused kernels.

A program owns a BLOCK_M x BLOCK_N tile of the result in float32 registers and walks along K; Triton's pipeline brings
the next tiles to shared memory meanwhile. Programs are numbered in groups of GROUP rows of tiles, so that those which
run at the same time share operands in the L2 cache. 2 M N K flops; the limit aimed at is the matrix units' rate.

Sums of several products lie in float32 between them or, where that would be a copy of a 16-bit result, in the result's
own memory and a byte of each element beside it (Between).

Where the result has fewer tiles than the GPU has multiprocessors (a weight's gradient: few outputs, thousands of
tokens), K is split; parts are added in a fixed order, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.columns import column_sums
from llmengine.backends.triton.device import multiprocessors, precision
from llmengine.backends.triton.tiles import Tile, pick

# K-steps that a part of a split product has at least.
SHORTEST = 8


class Between(NamedTuple):
    """Where sums that end in 16 bits lie until their last product has been added: the upper half of a float32 in the
    result's memory, the next 8 bits in `low` (uint8, of the result's strides). Rounded to nearest, to 2^-17."""

    low: torch.Tensor
    last: bool


@triton.jit
def tile_place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of this program's tile."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def accumulate(
    sums, a, b, m, n, M, N, first, last, a_m, a_k, b_k, b_n,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + a[m, first : last] b[first : last, n]. EVEN: last - first is a multiple of BLOCK_K.

    m, n: int64 rows and columns of the tile, those from M and N on are read as zeros. a_m, ...: strides.
    """
    k = first + tl.arange(0, BLOCK_K).to(tl.int64)
    left = a + m[:, None] * a_m + k[None, :] * a_k
    right = b + k[:, None] * b_k + n[None, :] * b_n
    for start in range(first, last, BLOCK_K):
        inside_a, inside_b = (m < M)[:, None], (n < N)[None, :]
        if not EVEN:
            inside_a &= (start + tl.arange(0, BLOCK_K) < last)[None, :]
            inside_b &= (start + tl.arange(0, BLOCK_K) < last)[:, None]
        x = tl.load(left, inside_a, 0.0)
        y = tl.load(right, inside_b, 0.0)
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
        left += BLOCK_K * a_k
        right += BLOCK_K * b_k
    return sums


@triton.jit
def stored_sums(c, low, at, inside):
    """float32 sums that `store_sums` left."""
    if low is None:
        return tl.load(c + at, inside, 0.0)
    else:
        upper = tl.load(c + at, inside, 0.0).to(tl.uint16, bitcast=True).to(tl.uint32)
        bits = (upper << 16) | (tl.load(low + at, inside, 0).to(tl.uint32) << 8)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_sums(sums, c, low, at, inside, LAST: tl.constexpr):
    """In c's dtype or, where there is more to come and c has 16 bits, as Between says."""
    if LAST:
        tl.store(c + at, sums.to(c.dtype.element_ty), inside)
    else:
        bits = tl.where(sums == sums, sums.to(tl.uint32, bitcast=True) + 0x80, 0x7FC00000)
        tl.store(c + at, (bits >> 16).to(tl.uint16).to(c.dtype.element_ty, bitcast=True), inside)
        tl.store(low + at, (bits >> 8).to(tl.uint8), inside)


@triton.jit
def _gemm(
    a, b, a2, b2, bias, residual, c, low, M, N, K, a_m, a_k, b_k, b_n, b2_k, b2_n, residual_m, c_m, part_stride,
    part_length,
    ADDED: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tile_place(M, N, BLOCK_M, BLOCK_N, GROUP)
    m = row + tl.arange(0, BLOCK_M).to(tl.int64)
    n = column + tl.arange(0, BLOCK_N).to(tl.int64)
    first = tl.program_id(1) * part_length
    last = tl.minimum(first + part_length, K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = accumulate(sums, a, b, m, n, M, N, first, last, a_m, a_k, b_k, b_n, BLOCK_K, EVEN, PRECISION)
    if a2 is not None:
        sums = accumulate(sums, a2, b2, m, n, M, N, first, last, a_m, a_k, b2_k, b2_n, BLOCK_K, EVEN, PRECISION)
    if bias is not None:
        sums += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    at = tl.program_id(1).to(tl.int64) * part_stride + m[:, None] * c_m + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if residual is not None:
        sums += tl.load(residual + m[:, None] * residual_m + n[None, :], inside, 0.0).to(tl.float32)
    if ADDED:
        sums += stored_sums(c, low, at, inside)
    store_sums(sums, c, low, at, inside, LAST)


def gemm(
    a, b, *, out=None, dtype=None, bias=None, residual=None, second=None, added=False, between: Between | None = None
):
    """a b (+ a2 b2 for second = (a2, b2)) + bias + residual, in `dtype` (a's unless told), into `out` where given.

    a (M, K), b (K, N), of one dtype and any strides; a2 is laid out as a; residual (M, N), of unit last stride. added:
    onto what `out` holds, in float32 or as `between` says.
    """
    (M, K), N = a.shape, b.shape[1]
    if out is None:
        out = a.new_empty((M, N), dtype=dtype or a.dtype)
    if not out.numel():
        return out
    tile = pick("fused" if added or between or residual is not None else "plain", a, b)
    parts = (
        1
        if added or between or bias is not None or residual is not None or second is not None
        else _parts(tile, M, N, K, multiprocessors(a.device))
    )
    steps = -(-K // tile.k)
    length = -(-steps // parts) * tile.k
    target = out if parts == 1 else a.new_empty((parts, M, N), dtype=torch.float32)
    a2, b2 = second or (None, b)
    _gemm[(tile.programs(M, N), parts)](
        a, b, a2, None if a2 is None else b2, bias, residual, target, between and between.low, M, N, K, *a.stride(),
        *b.stride(), *b2.stride(), 1 if residual is None else residual.stride(0), target.stride(-2), M * N, length,
        added, between is None or between.last,
        EVEN=K % (tile.k * parts) == 0, PRECISION=precision(a.dtype, a.device), **tile.constants(),
    )  # fmt: skip
    if parts > 1:
        column_sums(target.view(parts, M * N), out.view(M * N))
    return out


def weight_gradient(grad, x, dtype, main):
    """grad^T x in `dtype`; where there is a buffer for it, added to that, and nothing is returned."""
    if main is None:
        return gemm(grad.T, x, dtype=dtype)
    gemm(grad.T, x, out=main, added=True)
    return x.new_empty(0, dtype=dtype)


def _parts(tile: Tile, M: int, N: int, K: int, multiprocessors: int) -> int:
    """Into how many parts K is cut: as many as fill the multiprocessors without becoming short."""
    return max(min(multiprocessors // tile.programs(M, N), K // (tile.k * SHORTEST)), 1)
