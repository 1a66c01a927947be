"""Linear layer in CUDA: PyTorch's products (cuBLAS), or, where `Native.core_of` says so, csrc/cuda/gemm.cu."""

from __future__ import annotations

import os

import torch

from llmengine.backends.cuda.native import HALVES, PRODUCTS, Native, parameter, parts_of, unit_last_stride
from llmengine.ops.registry import Kernel, kernel


def asked_for(x: torch.Tensor) -> bool:
    """Whether the products of `x`, on a GPU, are to be our own, though no GPU has timed them yet: in autocast's dtype,
    where that casts. Under torch.compile asked while it traces: whoever changes the variable then compiles anew."""
    if not x.is_cuda or (os.environ.get(PRODUCTS) or "blas") == "blas":
        return False
    casts = x.dtype != torch.float64 and torch.is_autocast_enabled("cuda")
    return (torch.get_autocast_dtype("cuda") if casts else x.dtype) in HALVES


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def operand(x, on):
        """In the precision of the products, which are taken in that of `on`."""
        return unit_last_stride(x.to(on.dtype))

    def gemm(core, on, a, b, dtype, bias=None, out=None):
        """Onto what `out` holds, where it is given."""
        added = out
        if out is None:
            out = on.new_empty(a.shape[0], b.shape[1], dtype=dtype)
        native.call(
            "gemm", on, a=a, b=b, a2=None, b2=None, bias=parameter(bias, on), added=added, out=out,
            **native.products(on, core),
        )  # fmt: skip
        return out

    def forward_refuses(input, weight, bias):
        return native.refuses_tensors(input, weight, bias) or native.refuses_products(input)

    @kernel(table, "linear_forward", forward_refuses)
    def linear_forward(input, weight, bias):
        dtype = input.dtype
        if core := native.core_of("linear", input, weight):
            return gemm(core, input, operand(input, input), operand(weight, input).T, dtype, bias)
        return native.product(input, weight.to(dtype).T, None if bias is None else bias.to(dtype))

    def backward_refuses(grad_output, input, weight, *_):
        return native.refuses_tensors(grad_output, input, weight) or native.refuses_products(input)

    @kernel(table, "linear_backward", backward_refuses)
    def linear_backward(grad_output, input, weight, main, wanted):
        dtype = input.dtype
        if core := native.core_of("linear", input, weight, backward=True):
            grad_output, input, narrow = (operand(t, input) for t in (grad_output, input, weight))
            gradients = (
                (lambda: gemm(core, input, grad_output, narrow, dtype), dtype),
                (lambda: gemm(core, input, grad_output.T, input, weight.dtype, out=main), weight.dtype),
                (lambda: column_sums(grad_output), torch.float32),
            )
        else:
            gradients = (
                (lambda: native.product(grad_output, weight.to(dtype)), dtype),
                (lambda: native.weight_gradient(grad_output, input, weight.dtype, main), weight.dtype),
                (lambda: grad_output.sum(0, dtype=torch.float32), torch.float32),
            )
        made = [
            gradient() if want else input.new_empty(0, dtype=wide)
            for (gradient, wide), want in zip(gradients, wanted, strict=True)
        ]
        return (made[0], made[1] if main is None else weight.new_empty(0), made[2])

    def column_sums(rows):
        (tokens, columns), wide = rows.shape, torch.float32
        partial, sums = rows.new_empty(parts_of(tokens), columns, dtype=wide), rows.new_empty(columns, dtype=wide)
        native.call("column_sums", rows, rows=rows, partial=partial, sums=sums)
        return sums

    return table
