"""Attention of a few new tokens over a cache (formulas: csrc/ops/decode_attention.h), its keys split among programs.

A program owns a share of one sequence's keys for one key head, and `rows` rows of those that the query heads of its
group have, head after head: grouped heads read keys and values once. Against every tile of `keys` keys of its share

    products = query key^T, logits, new maximum m, P = exp(logits - m), output = exp(old m - m) output + P value

with keys and values read where they lie, each by its own address, which is all that pages change. Where several
programs share a sequence, each leaves maximum, sum and output in float32, and a second kernel adds them up in their
order. Shares follow from the length that the device reads: the launch depends on shapes alone.

Memory: keys and values once. Limit: reading them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.triton.attention import MOST_TOKENS, WIDEST
from llmengine.backends.triton.attention_tile import Distances, Rows, address
from llmengine.backends.triton.device import multiprocessors, refuses_tensors, unit_last_stride
from llmengine.backends.triton.maths import tanh
from llmengine.backends.triton.rows import power_of_2
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

TILE_ROWS = 16  # the least that tensor cores multiply
LEAST_KEYS = 128  # of a program's share: below, what shares leave costs more than they spare
MOST_SPLITS = 128


class Cache(NamedTuple):
    """Its memory, and the strides from page to page, slot to slot and head to head."""

    data: Tensor
    page: int
    slot: int
    head: int


class Pages(NamedTuple):
    """The table, and how many pages a sequence has, how many slots a page and how many pages there are."""

    table: Tensor
    of_sequence: int
    size: int
    all_pages: int


class Partials(NamedTuple):
    """What programs leave: (splits, all rows, width) and (splits, all rows, 2)."""

    sums: Tensor
    statistics: Tensor


class Sizes(NamedTuple):
    splits: int
    tiles: int
    heads: int
    key_heads: int
    rows: int
    capacity: int
    all_rows: int


class Options(NamedTuple):
    """None switches an option off, and its code with it."""

    slopes: Rows | None
    distances: Distances | None
    sinks: Tensor | None
    left: int | None
    scale: float
    cap: float | None


class Shape(NamedTuple):
    """Of a program's tiles, all compile-time constants. depth and width: head_dim and value_dim, padded."""

    keys: tl.constexpr
    head_dim: tl.constexpr
    depth: tl.constexpr
    value_dim: tl.constexpr
    width: tl.constexpr


ROWS: tl.constexpr = tl.constexpr(TILE_ROWS)


@triton.jit
def split_kernel(query, key, value, output, lse, lengths, pages, partials, sizes, option, shape):
    program = tl.program_id(0)
    owner, share = program // sizes.splits, program % sizes.splits
    key_head, tile = owner % sizes.key_heads, owner // sizes.key_heads % sizes.tiles
    b = tl.cast(owner // sizes.key_heads // sizes.tiles, tl.int64)
    length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), sizes.capacity)
    first, end = _share(length, share, sizes, option, shape.keys)

    group = sizes.heads // sizes.key_heads
    i = tile * ROWS + tl.arange(0, ROWS)
    exists, row = i < group * sizes.rows, i % sizes.rows
    head = tl.where(exists, key_head * group + i // sizes.rows, 0)
    position = tl.where(exists, length - sizes.rows + row, -1)[:, None]
    depth, width = tl.arange(0, shape.depth), tl.arange(0, shape.width)
    q_at = address(query, b, head, row)[:, None] + depth[None, :]
    q = tl.load(q_at, exists[:, None] & (depth < shape.head_dim)[None, :], 0.0)

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, shape.width], tl.float32)
    for start in range(first, end, shape.keys):
        place = start + tl.arange(0, shape.keys)
        k = _load(key, b, key_head, place, end, pages, depth, shape.head_dim)
        products = tl.dot(q, k.T, input_precision="ieee")
        logits = _logits(products, position, place[None, :], b, head, option)
        larger = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # no key seen yet: exp(-inf - 0) is 0, not NaN
        p = tl.exp(logits - base[:, None])
        beta = tl.exp(largest - base)
        total = total * beta + tl.sum(p, 1)
        v = _load(value, b, key_head, place, end, pages, width, shape.value_dim)
        sums = tl.dot(p.to(v.dtype), v, sums * beta[:, None], input_precision="ieee")
        largest = larger

    inside = exists[:, None] & (width < shape.value_dim)[None, :]
    at = (b * sizes.heads + head) * sizes.rows + row  # of all rows
    if partials is not None:
        at += tl.cast(share, tl.int64) * sizes.all_rows
        tl.store(partials.sums + at[:, None] * shape.width + width[None, :], sums, exists[:, None])
        tl.store(partials.statistics + at * 2, largest, exists)
        tl.store(partials.statistics + at * 2 + 1, total, exists)
    else:
        if option.sinks is not None:
            sink = tl.load(option.sinks + head)
            larger = tl.maximum(largest, sink)
            base = tl.where(larger == -float("inf"), 0.0, larger)
            sums *= tl.exp(largest - base)[:, None]
            total = total * tl.exp(largest - base) + tl.exp(sink - base)
            largest = larger
        some = tl.where(total == 0.0, 1.0, total)
        sums /= some[:, None]
        out_at = address(output, b, head, row)[:, None] + width[None, :]
        tl.store(out_at, sums.to(output.data.dtype.element_ty), inside)
        tl.store(lse + at, tl.where(total == 0.0, -float("inf"), largest + tl.log(some)), exists)


@triton.jit
def merge_kernel(output, lse, partials, sizes, option, shape):
    """A program adds up a row's shares."""
    at = tl.cast(tl.program_id(0), tl.int64)
    row, head, b = at % sizes.rows, at // sizes.rows % sizes.heads, at // sizes.rows // sizes.heads
    width = tl.arange(0, shape.width)
    largest, total = at * 0.0 - float("inf"), at * 0.0
    if option.sinks is not None:
        largest = tl.load(option.sinks + head)
    for share in range(sizes.splits):
        largest = tl.maximum(largest, tl.load(partials.statistics + (at + share * sizes.all_rows) * 2))
    base = tl.where(largest == -float("inf"), 0.0, largest)
    if option.sinks is not None:
        total = tl.exp(tl.load(option.sinks + head) - base)
    sums = tl.zeros([shape.width], tl.float32)
    for share in range(sizes.splits):
        part = at + share * sizes.all_rows
        weight = tl.exp(tl.load(partials.statistics + part * 2) - base)
        total += weight * tl.load(partials.statistics + part * 2 + 1)
        sums += weight * tl.load(partials.sums + part * shape.width + width)
    some = tl.where(total == 0.0, 1.0, total)
    sums /= some
    tl.store(address(output, b, head, row) + width, sums.to(output.data.dtype.element_ty), width < shape.value_dim)
    tl.store(lse + at, tl.where(total == 0.0, -float("inf"), largest + tl.log(some)))


@triton.jit
def _share(length, share, sizes, option, KEYS: tl.constexpr):
    """The keys [first, end) of a share (share_of in csrc/ops/decode_attention.h)."""
    begin = length * 0
    if option.left is not None:
        begin = tl.maximum(length - sizes.rows - option.left, 0)
    rounds = tl.cdiv(length - begin, KEYS)
    each, more = rounds // sizes.splits, rounds % sizes.splits
    first = share * each + tl.minimum(share, more)
    last = first + each + tl.where(share < more, 1, 0)
    return begin + first * KEYS, tl.minimum(begin + last * KEYS, length)


@triton.jit
def _load(cache, b, head, place, end, pages, column, COLUMNS: tl.constexpr):
    """The keys at these places, or their values; zeros from `end` on and beyond the last column."""
    there = place < end
    if pages is None:
        at = b * cache.page + tl.cast(place, tl.int64) * cache.slot
    else:  # wrong entries are clamped: a GPU cannot refuse them
        page = tl.load(pages.table + b * pages.of_sequence + place // pages.size, there, 0)
        page = tl.cast(tl.minimum(tl.maximum(page, 0), pages.all_pages - 1), tl.int64)
        at = page * cache.page + tl.cast(place % pages.size, tl.int64) * cache.slot
    pointers = cache.data + tl.cast(head, tl.int64) * cache.head + at[:, None] + column[None, :]
    return tl.load(pointers, there[:, None] & (column < COLUMNS)[None, :], 0.0)


@triton.jit
def _logits(products, position, place, b, head, option):
    logits = products * option.scale
    if option.cap is not None:
        logits = tanh(logits / option.cap) * option.cap
    back = position - place
    if option.slopes is not None:
        slope = tl.load(option.slopes.data + b * option.slopes.batch + head * option.slopes.head)
        logits -= slope[:, None] * back.to(tl.float32)
    seen = back >= 0
    if option.left is not None:
        seen &= back <= option.left
    if option.distances is not None:
        farthest = option.distances.farthest
        entry = farthest - tl.minimum(tl.maximum(back, 0), farthest)
        bias = tl.load(option.distances.data + tl.cast(head, tl.int64)[:, None] * (2 * farthest + 1) + entry)
        logits = tl.where(bias == -float("inf"), bias, logits + bias)
    return tl.where(seen, logits, -float("inf"))


# ---- launch ----------------------------------------------------------------------------------------------------------


def _capacity(key_cache: Tensor, block_table: Tensor | None) -> int:
    return key_cache.shape[2] if block_table is None else block_table.shape[1] * key_cache.shape[1]


def _refuses(query, key_cache, value_cache, cache_lengths, block_table, *_):
    if reason := refuses_tensors(query, key_cache, value_cache, cache_lengths, block_table):
        return reason
    if (widest := max(query.shape[3], value_cache.shape[3])) > WIDEST:
        return f"the triton backend takes head dims up to {WIDEST}, got {widest}"
    if (slots := _capacity(key_cache, block_table)) > MOST_TOKENS:
        return f"the triton backend takes up to {MOST_TOKENS} slots, got {slots}"
    return None


def _cache(x: Tensor, paged: bool) -> Cache:
    x = unit_last_stride(x)
    return Cache(x, x.stride(0), x.stride(1 if paged else 2), x.stride(2 if paged else 1))


@kernel(KERNELS, "decode_attention", _refuses)
def decode_attention(
    query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, distance_bias, sinks, window_left, scale,
    softcap,
):  # fmt: skip
    (batch, heads, rows, head_dim), value_dim, paged = query.shape, value_cache.shape[3], block_table is not None
    output = empty_rows_first(query, value_dim)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not lse.numel():
        return output, lse
    key_heads, capacity = key_cache.shape[2 if paged else 1], _capacity(key_cache, block_table)
    tiles = -(-heads * rows // (key_heads * TILE_ROWS))
    owners = batch * key_heads * tiles
    wanted = -(-2 * multiprocessors(query.device) // owners)
    splits = max(1, min(wanted, MOST_SPLITS, capacity // LEAST_KEYS))

    depth, width = (max(16, power_of_2(n)) for n in (head_dim, value_dim))
    line = max(depth, width) * query.element_size()  # bytes of a key
    keys, warps = max(16, min(64, 16384 // line)), 8 if line > 512 else 4
    shape = Shape(*map(tl.constexpr, (keys, head_dim, depth, value_dim, width)))
    sizes = Sizes(splits, tiles, heads, key_heads, rows, capacity, batch * heads * rows)
    options = Options(
        None if alibi_slopes is None else Rows(alibi_slopes, alibi_slopes.stride(0), alibi_slopes.stride(1), 0),
        None if distance_bias is None else Distances(distance_bias.contiguous(), distance_bias.shape[1] // 2),
        None if sinks is None else sinks.contiguous(),
        None if window_left < 0 else min(window_left, MOST_TOKENS),
        scale,
        softcap or None,
    )
    pages = Pages(block_table.contiguous(), block_table.shape[1], *key_cache.shape[1::-1]) if paged else None
    partials = None
    if splits > 1:
        partials = Partials(*(lse.new_empty(splits, batch * heads * rows, n) for n in (width, 2)))
    query, into = unit_last_stride(query), Rows(output, *output.stride()[:3])
    split_kernel[(owners * splits,)](
        Rows(query, *query.stride()[:3]), _cache(key_cache, paged), _cache(value_cache, paged), into, lse,
        cache_lengths.contiguous(), pages, partials, sizes, options, shape, num_warps=warps, num_stages=2,
    )  # fmt: skip
    if partials is not None:
        merge_kernel[(batch * heads * rows,)](into, lse, partials, sizes, options, shape, num_warps=1)
    return output, lse


def aot_calls(dtype: torch.dtype):
    """Classes of head dim, contiguous and paged, with nothing else and with everything (aot.py)."""

    def call(head_dim, batch, paged, everything):
        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        cache = meta(512, 64, 8, head_dim) if paged else meta(batch, 8, 4096, head_dim)
        table = meta(batch, 64, dtype=torch.int32) if paged else None
        extra = [meta(*shape, dtype=torch.float32) if everything else None for shape in ((batch, 32), (32, 257), (32,))]
        decode_attention(
            meta(batch, 32, 1, head_dim), cache, cache, meta(batch, dtype=torch.int32), table, *extra,
            1024 if everything else -1, head_dim**-0.5, 30.0 if everything else 0.0,
        )  # fmt: skip

    for head_dim, batch, paged, everything in ((128, 1, False, False), (64, 64, True, False), (256, 4, True, True)):
        name = f"{head_dim}, batch {batch}" + ", paged" * paged + ", everything" * everything
        yield name, functools.partial(call, head_dim, batch, paged, everything)
