"""Attention with products of 8-bit floats: `fp8=True` of `scaled_dot_product_attention` and `varlen_attention`."""

from __future__ import annotations

from llmengine.functional.arguments import needs_grad
from llmengine.ops.fp8_attention import fp8_attention

GOES_WITH = "is_causal, causal, window_size, scale, enable_gqa, sinks, return_lse"


def run_fp8(op, query, key, value, mask, slopes, bias, sinks, lengths, band, numbers):
    """Output and lse. lengths: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    tensors = {"attn_mask": mask, "alibi_slopes": slopes, "distance_bias": bias}
    given = [name for name, tensor in tensors.items() if tensor is not None]
    given += [name for name in ("softcap", "dropout_p") if getattr(numbers, name) != 0]
    if given:
        raise ValueError(f"{op}: fp8=True does not go with {given[0]}; allowed: {GOES_WITH}")
    if not numbers.scale > 0:
        raise ValueError(f"{op}: fp8=True takes a scale above 0, got {numbers.scale}")
    if needs_grad(query, key, value, sinks):
        raise ValueError(
            f"{op}: fp8=True has no gradient; allowed: a call under torch.no_grad(), or tensors that require none"
        )
    return fp8_attention(query, key, value, sinks, *lengths, *band, numbers.scale)
