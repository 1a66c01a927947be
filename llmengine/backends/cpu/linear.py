"""Linear layer on the CPU: csrc/cpu/kernels/linear.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import destinations, empty_gradients
from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

# From how many rows on our products of bfloat16 were measured to be quicker than PyTorch's (MEASUREMENTS.md, "Products
# on AMX" and "bf16 as floats"), by instruction set: fewer pay too much for packing the weight.
ROWS = {"amx": 1024, "avx512_rounding": 64}


def _isa() -> str:
    try:
        return module.isa() if module is not None else "none"
    except ValueError:  # LLMENGINE_CPU_ISA asks for what is not there: the first kernel says so
        return "none"


TILES = _isa() == "amx"
FROM_ROWS = ROWS.get(_isa())


def pays(dtype: torch.dtype, rows: int) -> bool:
    """Whether our products are quicker than PyTorch's."""
    return FROM_ROWS is not None and dtype == torch.bfloat16 and rows >= FROM_ROWS


@kernel(KERNELS, "linear_forward", refuses_tensors)
def linear_forward(input, weight, bias):
    output = torch.empty((input.shape[0], weight.shape[0]), dtype=input.dtype)
    module.linear_forward(
        input=unit_last_stride(input), weight=unit_last_stride(weight), bias=contiguous(bias), output=output
    )
    return output


@kernel(KERNELS, "linear_backward", lambda grad_output, input, weight, *_: refuses_tensors(input, weight))
def linear_backward(grad_output, input, weight, main, wanted):
    kinds = ((input.shape, input.dtype), (weight.shape, weight.dtype), (weight.shape[:1], torch.float32))
    gradients = empty_gradients(input, kinds, wanted, {1: main})
    grad_input, grad_weight, grad_bias = destinations(gradients, wanted, {1: main})
    module.linear_backward(
        grad_output=unit_last_stride(grad_output), input=unit_last_stride(input), weight=unit_last_stride(weight),
        grad_input=grad_input, grad_weight=grad_weight, grad_bias=grad_bias, add_weight=main is not None,
    )  # fmt: skip
    return gradients
