"""Rotary position embedding in CUDA: csrc/cuda/rotary.cu."""

from __future__ import annotations

from llmengine.backends.cuda.native import Native, unit_last_stride
from llmengine.ops.registry import Kernel, kernel


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def refuses(x, cos, sin, interleaved):
        return native.refuses_tensors(x, cos, sin)

    @kernel(table, "rotary_forward", refuses)
    def rotary_forward(input, cos, sin, interleaved):
        output = input.new_empty(input.shape)
        native.call(
            "rotary_forward", input, input=unit_last_stride(input), cos=cos.contiguous(), sin=sin.contiguous(),
            output=output, interleaved=interleaved,
        )  # fmt: skip
        return output

    @kernel(table, "rotary_backward", refuses)
    def rotary_backward(grad_output, cos, sin, interleaved):
        grad_input = grad_output.new_empty(grad_output.shape)
        native.call(
            "rotary_backward", grad_output, grad_output=unit_last_stride(grad_output), cos=cos.contiguous(),
            sin=sin.contiguous(), grad_input=grad_input, interleaved=interleaved,
        )  # fmt: skip
        return grad_input

    return table
