"""Attention over a cache in CUDA: csrc/cuda/decode_attention.cu."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.cuda.attention import MOST_TOKENS, WIDEST
from llmengine.backends.cuda.native import Native, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

TILE_ROWS = 16  # of a block, as in csrc/cuda/decode_attention.cu
LEAST_KEYS = 128  # of a block's share: below, what shares leave costs more than they spare
MOST_SPLITS = 128


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def refuses(query, key_cache, value_cache, cache_lengths, block_table, *_):
        if reason := native.refuses_tensors(query, key_cache, value_cache, cache_lengths, block_table):
            return reason
        if query.dtype == torch.float32:
            return f"the {native.backend} decode_attention multiplies bfloat16 and float16, got float32"
        if (widest := max(query.shape[3], value_cache.shape[3])) > WIDEST:
            return f"the {native.backend} decode_attention takes head dims up to {WIDEST}, got {widest}"
        if (slots := _capacity(key_cache, block_table)) > MOST_TOKENS:
            return f"the {native.backend} decode_attention takes up to {MOST_TOKENS} slots, got {slots}"
        return None

    def splits(query, key_cache, block_table) -> int:
        """Blocks that share a sequence's keys: so many that two for each multiprocessor have work. Of shapes alone."""
        batch, heads, rows, _ = query.shape
        key_heads = key_cache.shape[1 if block_table is None else 2]
        owners = batch * key_heads * -(-heads * rows // max(1, key_heads * TILE_ROWS))
        wanted = -(-2 * native.multiprocessors(query) // max(1, owners))
        return max(1, min(wanted, MOST_SPLITS, _capacity(key_cache, block_table) // LEAST_KEYS))

    @kernel(table, "decode_attention", refuses)
    def decode_attention(
        query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, distance_bias, sinks, window_left,
        scale, softcap,
    ):  # fmt: skip
        output = empty_rows_first(query, value_cache.shape[3])
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        sums = statistics = None
        if (shares := splits(query, key_cache, block_table)) > 1:
            width = -(-value_cache.shape[3] // 8) * 8
            sums, statistics = (lse.new_empty(shares, *lse.shape, n) for n in (width, 2))
        named = {
            "cache_lengths": cache_lengths, "block_table": block_table, "distance_bias": distance_bias, "sinks": sinks,
        }  # fmt: skip
        native.call(
            "decode_attention", query, query=unit_last_stride(query), key_cache=unit_last_stride(key_cache),
            value_cache=unit_last_stride(value_cache), alibi_slopes=alibi_slopes, window_left=window_left, scale=scale,
            softcap=softcap, output=output, lse=lse, partial_sums=sums, partial_statistics=statistics,
            **{name: None if x is None else x.contiguous() for name, x in named.items()},
        )  # fmt: skip
        return output, lse

    return table


def _capacity(key_cache, block_table) -> int:
    """The slots of a sequence."""
    return key_cache.shape[2] if block_table is None else block_table.shape[1] * key_cache.shape[1]
