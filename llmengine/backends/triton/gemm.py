"""Matrix products, alone and as the core of fused kernels.

A program owns a BLOCK_M x BLOCK_N tile of the result in float32 registers and walks along K; Triton's pipeline brings
the next tiles to shared memory meanwhile. Programs are numbered in groups of GROUP rows of tiles, so that those which
run at the same time share operands in the L2 cache. 2 M N K flops; the limit aimed at is the matrix units' rate.

Where the result has fewer tiles than the GPU has multiprocessors (a weight's gradient: few outputs, thousands of
tokens), K is split; parts are added in a fixed order, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.columns import column_sums
from llmengine.backends.triton.device import multiprocessors
from llmengine.backends.triton.tiles import Tile, pick, precision

# K-steps that a part of a split product has at least.
SHORTEST = 8


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
def _gemm(
    a, b, a2, b2, bias, c, M, N, K, a_m, a_k, b_k, b_n, b2_k, b2_n, c_m, part_stride, part_length,
    ADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
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
    place = c + tl.program_id(1).to(tl.int64) * part_stride + m[:, None] * c_m + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADDED:
        sums += tl.load(place, inside, 0.0)
    tl.store(place, sums.to(c.dtype.element_ty), inside)


def gemm(a, b, *, out=None, dtype=None, bias=None, second=None, added=False):
    """a b (+ a2 b2 for second = (a2, b2)) + bias, in `dtype` (a's unless told), into `out` where given.

    a (M, K), b (K, N), of one dtype and any strides; a2 is laid out as a. added: onto what float32 `out` holds.
    """
    (M, K), N = a.shape, b.shape[1]
    if out is None:
        out = a.new_empty((M, N), dtype=dtype or a.dtype)
    if not out.numel():
        return out
    tile = pick("fused" if added else "plain", a, b)
    parts = 1 if added or bias is not None or second is not None else _parts(tile, M, N, K, multiprocessors(a.device))
    steps = -(-K // tile.k)
    length = -(-steps // parts) * tile.k
    target = out if parts == 1 else a.new_empty((parts, M, N), dtype=torch.float32)
    a2, b2 = second or (None, b)
    _gemm[(tile.programs(M, N), parts)](
        a, b, a2, None if a2 is None else b2, bias, target, M, N, K, *a.stride(), *b.stride(), *b2.stride(),
        target.stride(-2), M * N, length, added, EVEN=K % (tile.k * parts) == 0, PRECISION=precision(a.dtype),
        **tile.constants(),
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
