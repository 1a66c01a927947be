"""Attention on the CPU: csrc/cpu/kernels/attention_forward.cpp and attention_backward.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

OPTIONS = (
    "mask", "alibi_slopes", "distance_bias", "sinks", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    "seed", "window_left", "window_right", "bottom_right", "scale", "softcap", "dropout_p",
)  # fmt: skip
CONTIGUOUS = ("distance_bias", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seed")


def _forward_refuses(query, key, value, mask, *_):
    return refuses_tensors(query, key, value, mask)


def _backward_refuses(grad_output, grad_lse, query, key, value, output, lse, lse_low, mask, *_):
    return refuses_tensors(grad_output, grad_lse, query, key, value, output, lse, mask)


def _arguments(query, key, value, options):
    """The arguments that forward and backward share, by their names in csrc/ops/attention.h."""
    named = dict(zip(OPTIONS, options, strict=True))
    for name in CONTIGUOUS:
        if named[name] is not None:
            named[name] = named[name].contiguous()
    named["mask"] = unit_last_stride(named["mask"])
    named["query"], named["key"], named["value"] = map(unit_last_stride, (query, key, value))
    return named


@kernel(KERNELS, "attention_forward", _forward_refuses)
def attention_forward(query, key, value, *options):
    output = empty_rows_first(query, value.shape[3])
    batch, heads, rows, _ = query.shape
    lse, lse_low = torch.empty(batch, heads, rows), torch.empty(batch, heads, rows)
    module.attention_forward(**_arguments(query, key, value, options), output=output, lse=lse, lse_low=lse_low)
    return output, lse, lse_low


@kernel(KERNELS, "attention_backward", _backward_refuses)
def attention_backward(grad_output, grad_lse, query, key, value, output, lse, lse_low, *options):
    *given, want_grad_mask, want_grad_distance_bias, want_grad_sinks = options
    grad_query, grad_key, grad_value = (empty_rows_first(x, x.shape[3]) for x in (query, key, value))
    grad_mask = torch.empty(given[0].shape if want_grad_mask else (0,))
    grad_distance_bias = torch.empty(given[2].shape if want_grad_distance_bias else (0,))
    grad_sinks = torch.empty(given[3].shape if want_grad_sinks else (0,))
    module.attention_backward(
        **_arguments(query, key, value, given), grad_output=unit_last_stride(grad_output),
        grad_lse=contiguous(grad_lse), output=output, lse=lse, lse_low=lse_low, grad_query=grad_query,
        grad_key=grad_key, grad_value=grad_value, grad_mask=grad_mask if want_grad_mask else None,
        grad_distance_bias=grad_distance_bias if want_grad_distance_bias else None,
        grad_sinks=grad_sinks if want_grad_sinks else None,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_mask, grad_distance_bias, grad_sinks
