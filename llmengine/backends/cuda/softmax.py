"""Softmax in CUDA: csrc/cuda/softmax.cu."""

from __future__ import annotations

from llmengine.backends.cuda.native import Native, unit_last_stride
from llmengine.ops.registry import Kernel, kernel


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def one_dtype(given, wanted):
        return None if given == wanted else f"the {native.backend} softmax has one dtype, got {given} and {wanted}"

    def forward_refuses(input, dtype):
        return native.refuses_tensors(input) or one_dtype(input.dtype, dtype)

    def backward_refuses(grad_output, output, dtype):
        return native.refuses_tensors(grad_output, output) or one_dtype(output.dtype, dtype)

    @kernel(table, "softmax_forward", forward_refuses)
    def softmax_forward(input, dtype):
        output = input.new_empty(input.shape)
        native.call("softmax_forward", input, input=unit_last_stride(input), output=output)
        return output

    @kernel(table, "softmax_backward", backward_refuses)
    def softmax_backward(grad_output, output, dtype):
        grad_input = output.new_empty(output.shape)
        native.call(
            "softmax_backward", output, grad_output=unit_last_stride(grad_output), output=unit_last_stride(output),
            grad_input=grad_input,
        )  # fmt: skip
        return grad_input

    return table
