"""Attention with relative positions: schemas, fake kernels, autograd.

Kernels see packed sequences as attention's do: query (1, heads, rows, head_dim), with the rows of all sequences one
after another. The biases are in the two queries already. Semantics: csrc/ops/relative_attention.h.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.backends.buffers import empty_rows_first
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define


def _forward_fake(query, position_query, key, value, *_):
    lse = query.new_empty(query.shape[:3], dtype=statistics_dtype(query))
    return empty_rows_first(query, value.shape[3]), lse, torch.empty_like(lse)


def _backward_fake(
    grad_output, grad_lse, output, lse, lse_low, query, position_query, key, value, position_key, segment_scores, *_
):
    operands = (query, position_query, key, value, position_key)
    gradients = (empty_rows_first(x, x.shape[3]) for x in operands)
    shape = (0,) if segment_scores is None else segment_scores.shape
    return (*gradients, query.new_empty(shape, dtype=statistics_dtype(query)))


# position_query: like query. position_key: (1, heads, distances, head_dim), of which row zero_distance is distance 0.
# segment_scores: (rows, heads, 2) in the statistics' dtype. Segments, positions and ranks: int32 (rows,) or (keys,).
_OPERANDS = "Tensor query, Tensor position_query, Tensor key, Tensor value, Tensor position_key, Tensor? segment_scores"
_OPTIONS = (
    "Tensor? query_segments, Tensor? key_segments, Tensor? query_positions, Tensor? query_ranks, Tensor? key_ranks,"
    " Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seed,"
    " SymInt zero_distance, bool is_causal, bool include_self, float scale, float dropout_p"
)
relative_attention_forward = define(
    f"relative_attention_forward({_OPERANDS}, {_OPTIONS}) -> (Tensor output, Tensor lse, Tensor lse_low)",
    _forward_fake,
)
# grad_segment_scores is empty where there are no segment_scores.
relative_attention_backward = define(
    "relative_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor lse, Tensor lse_low,"
    f" {_OPERANDS}, {_OPTIONS}) -> (Tensor grad_query, Tensor grad_position_query, Tensor grad_key, Tensor grad_value,"
    " Tensor grad_position_key, Tensor grad_segment_scores)",
    _backward_fake,
)

_OPERAND_COUNT, _TENSOR_COUNT, _OPTION_COUNT = 6, 7, 15


class RelativeAttention(torch.autograd.Function):
    """(the operands and options of the schema) -> (output, lse); differentiable in both outputs."""

    @staticmethod
    def forward(ctx, *args):
        output, lse, lse_low = relative_attention_forward(*args)
        operands, options = args[:_OPERAND_COUNT], args[_OPERAND_COUNT:]
        tensors, (max_q, max_k, seed, *numbers) = options[:_TENSOR_COUNT], options[_TENSOR_COUNT:]
        ctx.save_for_backward(output, lse, lse_low, *operands, *tensors, seed)
        ctx.max_seqlens, ctx.numbers = (max_q, max_k), numbers
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_lse):
        *saved, seed = ctx.saved_tensors
        if grad_output is None:
            if grad_lse is None:
                return (None,) * (_OPERAND_COUNT + _OPTION_COUNT)
            grad_output = torch.zeros_like(saved[0])
        *gradients, grad_segment_scores = relative_attention_backward(
            grad_output, grad_lse, *saved, *ctx.max_seqlens, seed, *ctx.numbers
        )
        has_segments = saved[3 + _OPERAND_COUNT - 1] is not None
        return *gradients, grad_segment_scores if has_segments else None, *(None,) * _OPTION_COUNT
