"""C++ kernels for CPUs (csrc/cpu), float32 and bfloat16. Buffers are allocated here, by PyTorch."""

from __future__ import annotations

from llmengine.backends.cpu import (
    adamw,
    attention,
    chain_field,
    cross_entropy,
    decode_attention,
    embedding,
    ffn,
    gradient_norm,
    linear,
    linear_cross_entropy,
    linear_cross_entropy_shard,
    norm,
    relative_attention,
    rotary,
    softmax,
)
from llmengine.backends.cpu.native import unavailable
from llmengine.ops.registry import Kernel

__all__ = ["KERNELS", "unavailable"]

KERNELS: dict[str, Kernel] = {
    **adamw.KERNELS,
    **attention.KERNELS,
    **chain_field.KERNELS,
    **cross_entropy.KERNELS,
    **decode_attention.KERNELS,
    **embedding.KERNELS,
    **ffn.KERNELS,
    **gradient_norm.KERNELS,
    **linear.KERNELS,
    **linear_cross_entropy.KERNELS,
    **linear_cross_entropy_shard.KERNELS,
    **norm.KERNELS,
    **relative_attention.KERNELS,
    **rotary.KERNELS,
    **softmax.KERNELS,
}
