"""Relative attention on the CPU: csrc/cpu/kernels/relative_attention_forward.cpp and ..._backward.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

OPERANDS = ("query", "position_query", "key", "value", "position_key")
TENSORS = (
    "segment_scores", "query_segments", "key_segments", "query_positions", "query_ranks", "key_ranks", "cu_seqlens_q",
    "cu_seqlens_k",
)  # fmt: skip
NUMBERS = ("max_seqlen_q", "max_seqlen_k", "seed", "zero_distance", "is_causal", "include_self", "scale", "dropout_p")


def _forward_refuses(*args):
    return refuses_tensors(*args[: len(OPERANDS)])


def _backward_refuses(grad_output, grad_lse, output, lse, lse_low, *args):
    return refuses_tensors(grad_output, grad_lse, output, lse, *args[: len(OPERANDS)])


def _arguments(args):
    """The arguments that forward and backward share, by their names in csrc/ops/relative_attention.h."""
    named = dict(zip((*OPERANDS, *TENSORS, *NUMBERS), args, strict=True))
    return (
        named
        | {name: unit_last_stride(named[name]) for name in OPERANDS}
        | {name: contiguous(named[name]) for name in (*TENSORS, "seed")}
    )


@kernel(KERNELS, "relative_attention_forward", _forward_refuses)
def relative_attention_forward(*args):
    query, _, _, value = args[:4]
    output = empty_rows_first(query, value.shape[3])
    lse, lse_low = torch.empty(query.shape[:3]), torch.empty(query.shape[:3])
    module.relative_attention_forward(**_arguments(args), output=output, lse=lse, lse_low=lse_low)
    return output, lse, lse_low


@kernel(KERNELS, "relative_attention_backward", _backward_refuses)
def relative_attention_backward(grad_output, grad_lse, output, lse, lse_low, *args):
    gradients = {f"grad_{name}": empty_rows_first(x, x.shape[3]) for name, x in zip(OPERANDS, args, strict=False)}
    segment_scores = args[len(OPERANDS)]
    grad_segment_scores = torch.empty((0,) if segment_scores is None else segment_scores.shape)
    module.relative_attention_backward(
        **_arguments(args), **gradients, grad_output=unit_last_stride(grad_output), grad_lse=contiguous(grad_lse),
        output=output, lse=lse, lse_low=lse_low,
        grad_segment_scores=None if segment_scores is None else grad_segment_scores,
    )  # fmt: skip
    return *gradients.values(), grad_segment_scores
