"""Attention of a few new tokens of each sequence over a cache of keys and values: schema, fake kernel.

Kernels see query (batch, heads, rows, head_dim), caches as csrc/ops/decode_attention.h describes them, of any strides,
cache_lengths int32 (batch,), block_table int32 (batch, pages) or none, alibi_slopes float32 (batch, heads), and
distance_bias and sinks in the accumulators' dtype. output is stored as (batch, rows, heads, value_dim). No gradients.
"""

from __future__ import annotations

from llmengine.backends.buffers import empty_rows_first
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define


def _fake(query, key_cache, value_cache, *_):
    lse = query.new_empty(query.shape[:3], dtype=statistics_dtype(query))
    return empty_rows_first(query, value_cache.shape[3]), lse


decode_attention = define(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, Tensor? block_table,"
    " Tensor? alibi_slopes, Tensor? distance_bias, Tensor? sinks, int window_left, float scale, float softcap)"
    " -> (Tensor output, Tensor lse)",
    _fake,
)
