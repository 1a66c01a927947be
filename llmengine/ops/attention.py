"""Attention of padded batches and of packed sequences: schemas, fake kernels, autograd.

Kernels see query (batch, heads, rows, head_dim) and key, value (batch, key heads, keys, ...). Packed sequences are a
batch of one whose rows `cu_seqlens` cuts into sequences. Output and gradients are laid out in memory as (batch, rows,
heads, head_dim), which the projections around attention read and write without a copy. Semantics: csrc/ops/attention.h.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.backends.buffers import empty_rows_first
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import Function, define


def _forward_fake(query, key, value, *_):
    lse = query.new_empty(query.shape[:3], dtype=statistics_dtype(query))
    return empty_rows_first(query, value.shape[3]), lse, torch.empty_like(lse)


def _backward_fake(grad_output, grad_lse, query, key, value, output, lse, lse_low, mask, _, distance, sinks, *rest):
    *_, want_grad_mask, want_grad_distance_bias, want_grad_sinks = rest
    return (
        empty_rows_first(query, query.shape[3]),
        empty_rows_first(key, key.shape[3]),
        empty_rows_first(value, value.shape[3]),
        query.new_empty(mask.shape if want_grad_mask else (0,), dtype=statistics_dtype(query)),
        query.new_empty(distance.shape if want_grad_distance_bias else (0,), dtype=statistics_dtype(query)),
        query.new_empty(sinks.shape if want_grad_sinks else (0,), dtype=statistics_dtype(query)),
    )


# mask: (1|batch, 1|heads, 1|rows, 1|keys), bool or float. alibi_slopes: float32 (sequences, heads). distance_bias: in
# the accumulators' dtype, (heads, 2 M + 1), of the distances -M ... M between key and row. sinks: in that dtype,
# (heads,). A query row at position p among the keys (p = row, or row + keys - rows where bottom_right) sees keys
# p - window_left ... p + window_right; -1 is unbounded. lse: natural log of the sum of exponentials, the sink's among
# them, -inf for a row that sees no key and no sink; lse_low: what rounding took from it.
_OPTIONS = (
    "Tensor? mask, Tensor? alibi_slopes, Tensor? distance_bias, Tensor? sinks, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seed, int window_left, int window_right,"
    " bool bottom_right, float scale, float softcap, float dropout_p"
)
attention_forward = define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS})"
    " -> (Tensor output, Tensor lse, Tensor lse_low)",
    _forward_fake,
)
# grad_mask, grad_distance_bias and grad_sinks: in the accumulators' dtype and the shapes of mask, bias and sinks,
# summed over what shares an element; empty unless wanted.
attention_backward = define(
    "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output,"
    f" Tensor lse, Tensor lse_low, {_OPTIONS}, bool want_grad_mask, bool want_grad_distance_bias,"
    " bool want_grad_sinks) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask,"
    " Tensor grad_distance_bias, Tensor grad_sinks)",
    _backward_fake,
)


class Attention(Function):
    """(query, key, value, the options of the schema) -> (output, lse); differentiable in both outputs."""

    @staticmethod
    def forward(
        ctx, query, key, value, mask, alibi_slopes, distance_bias, sinks, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
        seed, *numbers,
    ):  # fmt: skip
        tensors = (mask, alibi_slopes, distance_bias, sinks, cu_seqlens_q, cu_seqlens_k)
        output, lse, lse_low = attention_forward(query, key, value, *tensors, max_q, max_k, seed, *numbers)
        ctx.save_for_backward(query, key, value, output, lse, lse_low, seed, *tensors)
        ctx.max_seqlens, ctx.numbers = (max_q, max_k), numbers
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_lse):
        query, key, value, output, lse, lse_low, seed, *tensors = ctx.saved_tensors
        if grad_output is None:
            if grad_lse is None:
                return (None,) * 18
            grad_output = torch.zeros_like(output)
        _, _, _, want_grad_mask, _, want_grad_distance_bias, want_grad_sinks, *_ = ctx.needs_input_grad
        grad_query, grad_key, grad_value, grad_mask, grad_distance_bias, grad_sinks = attention_backward(
            grad_output, grad_lse, query, key, value, output, lse, lse_low, *tensors, *ctx.max_seqlens, seed,
            *ctx.numbers, want_grad_mask, want_grad_distance_bias, want_grad_sinks,
        )  # fmt: skip
        grad_mask = grad_mask.to(tensors[0].dtype) if want_grad_mask else None
        grad_distance_bias = grad_distance_bias if want_grad_distance_bias else None
        grad_sinks = grad_sinks if want_grad_sinks else None
        return grad_query, grad_key, grad_value, grad_mask, None, grad_distance_bias, grad_sinks, *(None,) * 11
