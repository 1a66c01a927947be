"""Embedding on the CPU: csrc/cpu/kernels/embedding.cpp."""

from __future__ import annotations

from llmengine.backends.cpu.native import module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _forward_refuses(input, weight, scale):
    return refuses_tensors(input, weight)


@kernel(KERNELS, "embedding_forward", _forward_refuses)
def embedding_forward(input, weight, scale):
    output = weight.new_empty(input.shape[0], weight.shape[1])
    module.embedding_forward(input=input.contiguous(), weight=unit_last_stride(weight), scale=scale, output=output)
    return output


def _backward_refuses(grad_output, input, *_):
    return refuses_tensors(grad_output, input)


@kernel(KERNELS, "embedding_backward", _backward_refuses)
def embedding_backward(grad_output, input, rows, padding_idx, scale):
    grad_weight = grad_output.new_empty(rows, grad_output.shape[1])
    module.embedding_backward(
        grad_output=unit_last_stride(grad_output), input=input.contiguous(), padding_idx=padding_idx, scale=scale,
        grad_weight=grad_weight,
    )  # fmt: skip
    return grad_weight
