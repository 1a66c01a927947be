"""Softmax on the CPU: csrc/cpu/kernels/softmax.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.native import DTYPES, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _forward_refuses(input, dtype):
    return refuses_tensors(input) or _refuses_dtype(dtype)


def _backward_refuses(grad_output, output, dtype):
    return refuses_tensors(grad_output, output) or _refuses_dtype(dtype)


def _refuses_dtype(dtype):
    return None if dtype in DTYPES else f"the cpu backend takes float32 and bfloat16, got {dtype}"


@kernel(KERNELS, "softmax_forward", _forward_refuses)
def softmax_forward(input, dtype):
    output = torch.empty(*input.shape, dtype=dtype)
    module.softmax_forward(input=unit_last_stride(input), output=output)
    return output


@kernel(KERNELS, "softmax_backward", _backward_refuses)
def softmax_backward(grad_output, output, dtype):
    grad_input = torch.empty(*output.shape, dtype=dtype)
    module.softmax_backward(
        grad_output=unit_last_stride(grad_output), output=unit_last_stride(output), grad_input=grad_input
    )
    return grad_input
