"""Rotary position embedding, written out from its formula (csrc/ops/rotary.h)."""

from __future__ import annotations

import torch

from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@kernel(KERNELS, "rotary_forward")
def rotary_forward(input, cos, sin, interleaved):
    pairs = cos.shape[1]
    turned, rest = input.to(cos.dtype).split([2 * pairs, input.shape[3] - 2 * pairs], -1)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1) if pairs else (turned, turned)
    cos, sin = cos[:, None], sin[:, None]  # the same for all heads
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, rest], -1).to(input.dtype).contiguous()


@kernel(KERNELS, "rotary_backward")
def rotary_backward(grad_output, cos, sin, interleaved):
    return rotary_forward(grad_output, cos, -sin, interleaved)
