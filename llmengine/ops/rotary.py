"""Rotary position embedding: schemas, fake kernels, autograd.

Kernels see `input` as (batch, tokens, heads, head_dim), of any strides, and cos and sin as (tokens, R / 2) in the
arithmetic's dtype; the result is contiguous. Semantics: csrc/ops/rotary.h.
"""

from __future__ import annotations

from torch.autograd.function import once_differentiable

from llmengine.ops.registry import Function, define


def _fake(input, cos, sin, interleaved):
    return input.new_empty(input.shape)


rotary_forward = define(
    "rotary_forward(Tensor input, Tensor cos, Tensor sin, bool interleaved) -> Tensor output", _fake
)
rotary_backward = define(
    "rotary_backward(Tensor grad_output, Tensor cos, Tensor sin, bool interleaved) -> Tensor grad_input", _fake
)


class Rotary(Function):
    """input with its features turned; the gradient is turned back."""

    @staticmethod
    def forward(ctx, input, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotary_forward(input, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return rotary_backward(grad_output, *ctx.saved_tensors, ctx.interleaved), None, None, None
