"""A linear-chain conditional random field's loss and best tags: schemas, fake kernels, autograd.

Kernels see `emissions` as (tokens, K), of any strides, `tags` as int64 (tokens,), `cu_seqlens` as int32
(sequences + 1,), and the parameters in the statistics' dtype: float32, or float64 for float64 emissions. A tag outside
[0, K) is a ValueError from the kernel on a CPU; a GPU kernel never waits to say so: it gives the loss NaN. Semantics:
csrc/ops/chain_field.h.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.ops.registry import define


def _forward_fake(emissions, tags, transition, start, end, cu_seqlens):
    return transition.new_empty(cu_seqlens.shape[0] - 1), transition.new_empty(emissions.shape)


def _backward_fake(grad_losses, emissions, tags, transition, start, end, cu_seqlens, alpha):
    return (
        emissions.new_empty(emissions.shape),
        transition.new_empty(transition.shape),
        start.new_empty(start.shape),
        end.new_empty(end.shape),
    )


def _decode_fake(emissions, transition, start, end, cu_seqlens):
    tags = emissions.new_empty(emissions.shape[0], dtype=torch.int64)
    return tags, transition.new_empty(cu_seqlens.shape[0] - 1)


# losses (sequences,) and alpha (tokens, K), in the statistics' dtype
chain_field_forward = define(
    "chain_field_forward(Tensor emissions, Tensor tags, Tensor transition, Tensor start, Tensor end, Tensor cu_seqlens)"
    " -> (Tensor losses, Tensor alpha)",
    _forward_fake,
)
chain_field_backward = define(
    "chain_field_backward(Tensor grad_losses, Tensor emissions, Tensor tags, Tensor transition, Tensor start,"
    " Tensor end, Tensor cu_seqlens, Tensor alpha)"
    " -> (Tensor grad_emissions, Tensor grad_transition, Tensor grad_start, Tensor grad_end)",
    _backward_fake,
)
chain_field_decode = define(
    "chain_field_decode(Tensor emissions, Tensor transition, Tensor start, Tensor end, Tensor cu_seqlens)"
    " -> (Tensor tags, Tensor scores)",
    _decode_fake,
)


class ChainField(torch.autograd.Function):
    """chain_field(emissions, tags, transition, start, end, cu_seqlens) -> losses."""

    @staticmethod
    def forward(ctx, emissions, tags, transition, start, end, cu_seqlens):
        arguments = (emissions, tags, transition, start, end, cu_seqlens)
        losses, alpha = chain_field_forward(*arguments)
        ctx.save_for_backward(*arguments, alpha)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        emissions, transition, start, end = chain_field_backward(grad_losses, *ctx.saved_tensors)
        return emissions, None, transition, start, end, None
