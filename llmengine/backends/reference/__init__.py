"""Plain PyTorch, any float dtype, any device: the oracle that every other backend is tested against, in float64.

16-bit inputs are computed in float32 and rounded once at the end. Clear before fast.
"""

from __future__ import annotations

from llmengine.backends.reference import (
    adamw,
    attention,
    chain_field,
    cross_entropy,
    decode_attention,
    embedding,
    ffn,
    fp8_attention,
    fp8_linear,
    gradient_norm,
    linear,
    linear_cross_entropy,
    linear_cross_entropy_shard,
    norm,
    relative_attention,
    rotary,
    softmax,
)
from llmengine.ops.registry import Kernel

KERNELS: dict[str, Kernel] = {
    **adamw.KERNELS,
    **attention.KERNELS,
    **chain_field.KERNELS,
    **cross_entropy.KERNELS,
    **decode_attention.KERNELS,
    **embedding.KERNELS,
    **ffn.KERNELS,
    **fp8_attention.KERNELS,
    **fp8_linear.KERNELS,
    **gradient_norm.KERNELS,
    **linear.KERNELS,
    **linear_cross_entropy.KERNELS,
    **linear_cross_entropy_shard.KERNELS,
    **norm.KERNELS,
    **relative_attention.KERNELS,
    **rotary.KERNELS,
    **softmax.KERNELS,
}


def unavailable() -> str | None:
    return None
