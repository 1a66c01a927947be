"""Attention over a cache, written out from its formulas (csrc/ops/decode_attention.h), sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.backends.buffers import empty_rows_first
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@kernel(KERNELS, "decode_attention")
def decode_attention(
    query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, distance_bias, sinks, window_left, scale,
    softcap,
):  # fmt: skip
    output = empty_rows_first(query, value_cache.shape[3])
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=wide)
    heads, rows = query.shape[1:3]
    for b, length in enumerate(_lengths(cache_lengths, key_cache, block_table)):
        first = max(0, length - rows - window_left) if window_left >= 0 else 0  # what lies before it is not looked at
        pages = None if block_table is None else _pages(b, block_table[b].tolist(), first, length, key_cache)
        key, value = (_tokens(x, b, first, length, pages, heads).to(wide) for x in (key_cache, value_cache))
        u = scale * (query[b].to(wide) @ key.mT)
        u = softcap * torch.tanh(u / softcap) if softcap else u
        position = torch.arange(length - rows, length, device=query.device)[:, None]
        distance = torch.arange(first, length, device=query.device) - position
        if alibi_slopes is not None:
            u = u - alibi_slopes[b].to(wide)[:, None, None] * distance.abs()
        if distance_bias is not None:
            farthest = distance_bias.shape[1] // 2
            u = u + distance_bias.to(wide)[:, distance.clamp(-farthest, farthest) + farthest]
        seen = distance <= 0
        if window_left >= 0:
            seen &= distance >= -window_left
        logits = torch.where(seen, u, -torch.inf)
        sink = torch.full((heads,), -torch.inf) if sinks is None else sinks  # a logit whose value is 0
        logits = torch.cat([logits, sink.to(logits)[:, None, None].expand(heads, rows, 1)], -1)
        lse[b] = logits.logsumexp(-1)
        p = torch.where(lse[b, ..., None] == -torch.inf, 0.0, logits.softmax(-1)[..., :-1])
        output[b] = (p @ value).to(output.dtype)
    return output, lse


def _lengths(cache_lengths: Tensor, key_cache: Tensor, block_table: Tensor | None) -> list[int]:
    capacity = key_cache.shape[2] if block_table is None else block_table.shape[1] * key_cache.shape[1]
    lengths = cache_lengths.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"decode_attention: cache_lengths is {length} at {b}; allowed: 0 to {capacity}, the slots of a sequence"
            )
    return lengths


def _pages(b: int, table: list[int], first: int, length: int, cache: Tensor) -> list[int]:
    """Those that hold the sequence's tokens from `first` on."""
    size = cache.shape[1]
    begin = first // max(size, 1)
    used = table[begin : -(-length // size)] if length else []
    for n, page in enumerate(used, begin):
        if not 0 <= page < cache.shape[0]:
            raise ValueError(
                f"decode_attention: block_table is {page} at ({b}, {n}); allowed: 0 to {cache.shape[0] - 1}"
            )
    return used


def _tokens(cache: Tensor, b: int, first: int, length: int, pages: list[int] | None, heads: int) -> Tensor:
    """The sequence's tokens from `first` on as (heads, tokens, dim)."""
    if pages is None:
        tokens = cache[b, :, first:length]
    else:
        skipped = first % max(cache.shape[1], 1)
        tokens = cache[pages].flatten(0, 1)[skipped : skipped + length - first].transpose(0, 1)
    return tokens if tokens.shape[0] in (0, heads) else tokens.repeat_interleave(heads // tokens.shape[0], 0)
