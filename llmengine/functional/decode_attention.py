"""Attention of new tokens over a cache of keys and values: what generation does at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from llmengine.functional.arguments import (
    autocast,
    check_float,
    check_same_device,
    check_same_dtype,
    check_tensor,
    needs_grad,
    short,
)
from llmengine.functional.attention_options import (
    UNBOUNDED,
    distance_bias_of,
    scale_and_cap,
    sides_of,
    sinks_of,
    slopes_of,
)
from llmengine.ops import decode_attention as ops

OP = "decode_attention"


@overload
def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None = None, *,
    scale: float | None = None, window_size: Sequence[int] = UNBOUNDED, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, distance_bias: Tensor | None = None, sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None = None, *,
    scale: float | None = None, window_size: Sequence[int] = UNBOUNDED, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, distance_bias: Tensor | None = None, sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    scale: float | None = None,
    window_size: Sequence[int] = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last L tokens of each sequence over all of its tokens, whose keys and values lie in a cache. L
    is 1 in ordinary generation, more where tokens are drafted. The keys are split among threads or blocks, so that a
    single long sequence keeps a machine busy. For inference: there are no gradients.

    Shapes: query (batch, H, L, D); the result is (batch, H, L, Dv), in memory (batch, L, H, Dv). key_cache (batch, Hk,
    capacity, D) and value_cache (batch, Hk, capacity, Dv) in any strides; each key head serves H / Hk query heads.
    cache_lengths: int32 (batch,), the tokens that each sequence has in the cache, the queries' own included. Row r of
        sequence b stands at p = cache_lengths[b] - L + r and sees the keys up to p; rows before the first token see
        nothing. Slots from cache_lengths[b] on are never read: they may hold anything.
    block_table: int32 (batch, pages a sequence): the caches are then pages that all sequences share, (pages, page
        size, Hk, D), and token t of sequence b lies in page block_table[b, t // page size], slot t % page size. Entries
        of pages past a sequence's tokens, or wholly before all of its rows' windows, are not looked at.
    scale, softcap, alibi_slopes, distance_bias, sinks, return_lse: as `scaled_dot_product_attention`, with p above.
    window_size: (left, right) as there; no row sees a key behind its own, so that right is 0 or -1.

    A row that sees no key gives 0 and lse -inf (with a sink: the sink). Nothing waits for a GPU and the launches depend
    on shapes alone, so that calls may be captured in a CUDA graph; what lengths and table say is therefore checked on
    the CPU alone (ValueError), while a GPU takes the nearest number that is possible. On a CPU a sequence's result
    depends neither on its batch nor on the number of threads; on a GPU the batch's size decides how keys are split.
    Under autocast a cache of another dtype is copied: keep it in autocast's.
    """
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_float(OP, name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{OP}: {name} has shape {tuple(tensor.shape)}; expected four dimensions")
    if needs_grad(query, key_cache, value_cache, distance_bias, sinks):
        raise RuntimeError(
            f"{OP}: has no gradients, but an argument requires one; call it under torch.no_grad(), or "
            "scaled_dot_product_attention for training"
        )
    query, key_cache, value_cache = autocast(query, key_cache, value_cache)
    check_same_dtype(OP, query=query, key_cache=key_cache, value_cache=value_cache)
    _check_places(query, key_cache, value_cache, cache_lengths, block_table)
    slopes = slopes_of(OP, alibi_slopes, query, query.shape[0], "batch")
    bias, sinks = distance_bias_of(OP, distance_bias, query), sinks_of(OP, sinks, query)
    check_same_device(
        OP, query=query, key_cache=key_cache, value_cache=value_cache, cache_lengths=cache_lengths,
        block_table=block_table, alibi_slopes=slopes, distance_bias=bias, sinks=sinks,
    )  # fmt: skip
    left, right = sides_of(OP, window_size)
    if right > 0:
        raise ValueError(f"{OP}: window_size is {tuple(window_size)}; right must be 0 or -1")
    numbers = scale_and_cap(OP, scale, softcap, query.shape[3])
    output, lse = ops.decode_attention(
        query, key_cache, value_cache, cache_lengths, block_table, slopes, bias, sinks, left, *numbers
    )
    return (output, lse) if return_lse else output


def _check_places(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None
) -> None:
    batch, heads, _, head_dim = query.shape
    _check_numbers("cache_lengths", cache_lengths, (batch,), "batch")
    key_heads = key_cache.shape[1 if block_table is None else 2]
    given = tuple(key_cache.shape)
    if block_table is None:
        expected: tuple[int, ...] = (batch, *given[1:3], head_dim)
        what = "(batch, key heads, capacity, head_dim)"
    else:
        check_tensor(OP, "block_table", block_table)
        pages = block_table.shape[1] if block_table.ndim == 2 else 0
        _check_numbers("block_table", block_table, (batch, pages), "batch, pages a sequence")
        expected, what = (*given[:3], head_dim), "(pages, page size, key heads, head_dim)"
    if head_dim == 0 or value_cache.shape[3] == 0:
        raise ValueError(f"{OP}: head_dim must be at least 1")
    if given != expected:
        raise ValueError(f"{OP}: key_cache has shape {given}; expected {expected}, {what}")
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(f"{OP}: value_cache has shape {tuple(value_cache.shape)} but key_cache has {given}; all but "
                         "the last must be equal")  # fmt: skip
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"{OP}: query has {heads} heads, which is no multiple of the caches' {key_heads}")


def _check_numbers(argument: str, tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    check_tensor(OP, argument, tensor)
    if tensor.dtype != torch.int32 or tensor.shape != shape:
        raise ValueError(
            f"{OP}: {argument} must be int32 of shape {shape} ({what}), got {short(tensor.dtype)} {tuple(tensor.shape)}"
        )
