"""Attention with products of 8-bit floats: schema, fake kernel.

Arguments and results are those of attention_forward (llmengine/ops/attention.py), of which it has fewer: what stands
between scores and probabilities is a positive scale, and which keys a row sees. How numbers are rounded is in
llmengine/backends/fp8.py. No gradients.
"""

from __future__ import annotations

from llmengine.backends.buffers import empty_rows_first
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define


def _fake(query, key, value, *_):
    lse = query.new_empty(query.shape[:3], dtype=statistics_dtype(query))
    return empty_rows_first(query, value.shape[3]), lse


fp8_attention = define(
    "fp8_attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, int window_left, int window_right, bool bottom_right, float scale)"
    " -> (Tensor output, Tensor lse)",
    _fake,
)
