"""Rotary position embedding on the CPU: csrc/cpu/kernels/rotary.cpp."""

from __future__ import annotations

from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _refuses(x, cos, sin, interleaved):
    return refuses_tensors(x, cos, sin)


@kernel(KERNELS, "rotary_forward", _refuses)
def rotary_forward(input, cos, sin, interleaved):
    output = input.new_empty(*input.shape)
    module.rotary_forward(
        input=unit_last_stride(input), cos=contiguous(cos), sin=contiguous(sin), output=output, interleaved=interleaved
    )
    return output


@kernel(KERNELS, "rotary_backward", _refuses)
def rotary_backward(grad_output, cos, sin, interleaved):
    grad_input = grad_output.new_empty(*grad_output.shape)
    module.rotary_backward(
        grad_output=unit_last_stride(grad_output), cos=contiguous(cos), sin=contiguous(sin), grad_input=grad_input,
        interleaved=interleaved,
    )  # fmt: skip
    return grad_input
