"""The kernels of csrc/cuda on one of the modules that have them."""

from __future__ import annotations

from llmengine.backends.cuda import (
    adamw,
    attention,
    cross_entropy,
    decode_attention,
    embedding,
    ffn,
    fp8_attention,
    fp8_linear,
    gradient_norm,
    linear,
    linear_cross_entropy,
    norm,
    rotary,
    softmax,
)
from llmengine.backends.cuda.native import Native
from llmengine.ops.registry import Kernel


def all_kernels(native: Native) -> dict[str, Kernel]:
    files = (
        adamw,
        attention,
        cross_entropy,
        decode_attention,
        embedding,
        ffn,
        fp8_attention,
        fp8_linear,
        gradient_norm,
        linear,
        linear_cross_entropy,
        norm,
        rotary,
        softmax,
    )
    return {op: run for file in files for op, run in file.kernels(native).items()}
