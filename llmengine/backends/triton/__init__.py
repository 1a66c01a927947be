"""Kernels in Triton, for every GPU that it compiles for; one file per operator."""

from __future__ import annotations

from llmengine.backends.triton.device import on_its_device, unavailable
from llmengine.ops.registry import Kernel

__all__ = ["KERNELS", "unavailable"]

KERNELS: dict[str, Kernel] = {}

if unavailable() is None:
    from llmengine.backends.triton import (
        adamw,
        attention,
        chain_field,
        cross_entropy,
        decode_attention,
        embedding,
        ffn,
        gradient_norm,
        linear_cross_entropy,
        norm,
        relative_attention,
        rotary,
        softmax,
    )

    for module in (
        adamw, attention, chain_field, cross_entropy, decode_attention, embedding, ffn, gradient_norm,
        linear_cross_entropy, norm, relative_attention, rotary, softmax,
    ):  # fmt: skip
        KERNELS |= {name: Kernel(on_its_device(k.run), k.refuses) for name, k in module.KERNELS.items()}
