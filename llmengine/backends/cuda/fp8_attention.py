"""Attention with products of 8-bit floats on Hopper (csrc/cuda/attention_fp8_{quantise,forward}_sm90a.cu)."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.cuda.attention import MOST_TOKENS, places_of_tiles, turns_room
from llmengine.backends.cuda.native import HOPPER, Native, unit_last_stride
from llmengine.backends.fp8 import TILE, WIDTHS, width_of
from llmengine.ops.registry import Kernel, kernel

OPTIONS = (
    "sinks", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "window_left", "window_right",
    "bottom_right", "scale",
)  # fmt: skip
OPERANDS = ("query", "key", "value")


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def refuses(query, key, value, *options):
        if reason := native.refuses_tensors(query, key, value):
            return reason
        of = f"the {native.backend} fp8_attention"
        if query.dtype == torch.float32:
            return f"{of} rounds bfloat16 and float16, got float32"
        if (dim := query.shape[3]) > WIDTHS[-1]:
            return f"{of} takes head dims up to {WIDTHS[-1]}, got {dim}"
        if value.shape[3] > width_of(dim):
            return f"{of} takes values of up to {width_of(dim)} columns beside keys of {dim}, got {value.shape[3]}"
        if (tokens := max(query.shape[2], key.shape[2])) > MOST_TOKENS:
            return f"{of} takes up to {MOST_TOKENS} tokens, got {tokens}"
        if (found := native.capability(query)) != HOPPER:
            return f"products of 8-bit floats are for compute capability 9.0, the device has {found[0]}.{found[1]}"
        return None

    def quantised(name, x, cu_seqlens, width):
        """Numbers and scales of x (batch, heads, tokens, columns), as the forward's arguments."""
        heads = x.shape[1]
        tiles = places_of_tiles(x, cu_seqlens, TILE)
        numbers = x.new_empty(tiles, heads, TILE * width, dtype=torch.uint8)
        scales = x.new_empty(tiles, heads, dtype=torch.float32)
        native.call(
            "attention_fp8_quantise", x, x=x, cu_seqlens=cu_seqlens, operand=name, numbers=numbers, scales=scales
        )
        return {f"{name}_numbers": numbers, f"{name}_scales": scales}

    @kernel(table, "fp8_attention", refuses)
    def fp8_attention(query, key, value, *options):
        named = dict(zip(OPTIONS, options, strict=True))
        for name in ("sinks", "cu_seqlens_q", "cu_seqlens_k"):
            named[name] = None if named[name] is None else named[name].contiguous()
        operands = {name: unit_last_stride(x) for name, x in zip(OPERANDS, (query, key, value), strict=True)}
        bytes: dict[str, torch.Tensor] = {}
        for name, x in operands.items():
            cu_seqlens = named["cu_seqlens_q" if name == "query" else "cu_seqlens_k"]
            bytes |= quantised(name, x, cu_seqlens, width_of(query.shape[3]))
        output = empty_rows_first(query, value.shape[3])
        lse, lse_low = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
        native.call(
            "attention_fp8_forward", query, **operands, **named, **bytes, output=output, lse=lse, lse_low=lse_low,
            mask=None, alibi_slopes=None, distance_bias=None, seed=None, softcap=0.0, dropout_p=0.0,
            turns=turns_room(1, query, key, named["cu_seqlens_q"]),
        )  # fmt: skip
        return output, lse

    return table
