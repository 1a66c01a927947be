"""The chain field on the CPU: csrc/cpu/kernels/chain_field.cpp and chain_field_decode.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _refuses(*tensors):
    return refuses_tensors(*tensors)


def _field(emissions, transition, start, end, cu_seqlens):
    return {
        "emissions": unit_last_stride(emissions), "transition": contiguous(transition), "start": contiguous(start),
        "end": contiguous(end), "cu_seqlens": contiguous(cu_seqlens),
    }  # fmt: skip


@kernel(KERNELS, "chain_field_forward", _refuses)
def chain_field_forward(emissions, tags, transition, start, end, cu_seqlens):
    losses, alpha = torch.empty(cu_seqlens.shape[0] - 1), torch.empty(emissions.shape)
    field = _field(emissions, transition, start, end, cu_seqlens)
    module.chain_field_forward(**field, tags=contiguous(tags), losses=losses, alpha=alpha)
    return losses, alpha


@kernel(KERNELS, "chain_field_backward", _refuses)
def chain_field_backward(grad_losses, emissions, tags, transition, start, end, cu_seqlens, alpha):
    grad_emissions = torch.empty(emissions.shape, dtype=emissions.dtype)
    grad_transition, grad_start, grad_end = (torch.empty(x.shape) for x in (transition, start, end))
    module.chain_field_backward(
        **_field(emissions, transition, start, end, cu_seqlens), grad_losses=grad_losses, tags=contiguous(tags),
        alpha=contiguous(alpha), grad_emissions=grad_emissions, grad_transition=grad_transition, grad_start=grad_start,
        grad_end=grad_end,
    )  # fmt: skip
    return grad_emissions, grad_transition, grad_start, grad_end


@kernel(KERNELS, "chain_field_decode", _refuses)
def chain_field_decode(emissions, transition, start, end, cu_seqlens):
    tags, scores = torch.empty(emissions.shape[0], dtype=torch.int64), torch.empty(cu_seqlens.shape[0] - 1)
    module.chain_field_decode(**_field(emissions, transition, start, end, cu_seqlens), tags=tags, scores=scores)
    return tags, scores
