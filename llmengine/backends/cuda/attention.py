"""Attention in CUDA: csrc/cuda/attention_sm80_forward.cu, and _keys.cu and _rows.cu for the backward."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.cuda.native import Native, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

OPTIONS = (
    "mask", "alibi_slopes", "distance_bias", "sinks", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    "seed", "window_left", "window_right", "bottom_right", "scale", "softcap", "dropout_p",
)  # fmt: skip
WIDEST = 256  # the widest head whose sums stay in registers
MOST_TOKENS = 2**30  # positions, and windows beside them, are 32-bit numbers


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def forward_refuses(query, key, value, mask, alibi_slopes, distance_bias, sinks, *options):
        if reason := native.refuses_tensors(query, key, value, mask):
            return reason
        if sinks is not None:
            return f"the {native.backend} attention has no sinks yet; it has every other option"
        if query.dtype == torch.float32:
            return f"the {native.backend} attention multiplies bfloat16 and float16, got float32"
        if (widest := max(query.shape[3], value.shape[3])) > WIDEST:
            return f"the {native.backend} attention takes head dims up to {WIDEST}, got {widest}"
        if (tokens := max(query.shape[2], key.shape[2])) > MOST_TOKENS:
            return f"the {native.backend} attention takes up to {MOST_TOKENS} tokens, got {tokens}"
        return None

    def backward_refuses(grad_output, grad_lse, query, key, value, output, lse, lse_low, *options):
        *given, want_grad_mask, want_grad_distance_bias, _ = options
        for wanted, of in ((want_grad_mask, "an additive mask"), (want_grad_distance_bias, "distance_bias")):
            if wanted:
                return f"the {native.backend} attention has no gradient of {of} yet; it has those of query, key, value"
        return native.refuses_tensors(grad_output, grad_lse, output, lse) or forward_refuses(query, key, value, *given)

    @kernel(table, "attention_forward", forward_refuses)
    def attention_forward(query, key, value, *options):
        output = empty_rows_first(query, value.shape[3])
        lse, lse_low = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
        native.call(
            "attention_forward", query, **_arguments(query, key, value, options), output=output, lse=lse,
            lse_low=lse_low,
        )  # fmt: skip
        return output, lse, lse_low

    @kernel(table, "attention_backward", backward_refuses)
    def attention_backward(grad_output, grad_lse, query, key, value, output, lse, lse_low, *options):
        *given, _, _, _ = options
        grad_query, grad_key, grad_value = (empty_rows_first(x, x.shape[3]) for x in (query, key, value))
        native.call(
            "attention_backward", query, **_arguments(query, key, value, given),
            grad_output=unit_last_stride(grad_output), grad_lse=None if grad_lse is None else grad_lse.contiguous(),
            output=output, lse=lse, lse_low=lse_low, grad_query=grad_query, grad_key=grad_key, grad_value=grad_value,
            grad_mask=None, grad_distance_bias=None, grad_sinks=None, base=torch.empty_like(lse),
            delta=torch.empty_like(lse),
        )  # fmt: skip
        none = [query.new_empty(0, dtype=torch.float32) for _ in range(3)]
        return grad_query, grad_key, grad_value, *none

    return table


def _arguments(query, key, value, options):
    """The arguments that forward and backward share, by their names in csrc/ops/attention.h."""
    named = dict(zip(OPTIONS, options, strict=True))
    for name in ("distance_bias", "cu_seqlens_q", "cu_seqlens_k", "seed"):
        named[name] = None if named[name] is None else named[name].contiguous()
    mask = named.pop("mask")
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.float()
    operands = {"query": query, "key": key, "value": value, "mask": mask}
    return {name: unit_last_stride(t) for name, t in operands.items()} | named
