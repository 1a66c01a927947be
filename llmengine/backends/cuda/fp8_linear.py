"""Linear layer in 8-bit floats on Hopper (csrc/cuda/fp8_quantise_sm90a.cu, fp8_product_sm90a.cu)."""

from __future__ import annotations

import torch

from llmengine.backends.cuda.native import HOPPER, Native, parameter, unit_last_stride
from llmengine.backends.fp8 import lines_of_block, numbers_shape, scales_shape
from llmengine.ops.registry import Kernel, kernel

NOTHING = (None, None)


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def room(x, block, lines, k):
        """For numbers and their scales."""
        numbers = x.new_empty(numbers_shape(lines, k), dtype=torch.uint8)
        return numbers, x.new_empty(scales_shape(lines, k, block), dtype=torch.float32)

    def quantised(x, format, block, rows, columns):
        """(numbers, scales) of x and of its transpose, where they are wanted."""
        (lines, k), x = x.shape, unit_last_stride(x)
        as_rows = room(x, block, lines, k) if rows else NOTHING
        as_columns = room(x, block, k, lines) if columns else NOTHING
        maxima = x.new_empty(min(max(lines, 1), 512), dtype=torch.float32) if block == 0 else None
        native.call(
            "fp8_quantise", x, x=x, format=format, block=block, maxima=maxima, rows=as_rows[0],
            row_scales=as_rows[1], columns=as_columns[0], column_scales=as_columns[1],
        )  # fmt: skip
        return as_rows, as_columns

    def product(a, format, b, dtype, bias=None, out=None):
        """Onto what `out` holds, where it is given."""
        (left, left_scales), (right, right_scales) = a, b
        added = out
        if out is None:
            out = left.new_empty(left.shape[0], right.shape[0], dtype=dtype)
        if left.shape[1] > 0:
            native.call(
                "fp8_product", out, a=left, b=right, a_format=format, a_scales=left_scales, b_scales=right_scales,
                bias=bias, added=added, out=out, room=native.room(out),
            )  # fmt: skip
        elif added is None:
            out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return out

    def refuses(*tensors):
        if (reason := native.refuses_tensors(*tensors)) is not None:
            return reason
        if (found := native.capability(tensors[0])) != HOPPER:
            return f"products of 8-bit floats are for compute capability 9.0, the device has {found[0]}.{found[1]}"
        return None

    def or_empty(quantity, like):
        nothing = like.new_empty(0, dtype=torch.uint8), like.new_empty(0, dtype=torch.float32)
        return nothing if quantity is NOTHING else quantity

    @kernel(table, "fp8_weight", lambda weight, *_: refuses(weight))
    def fp8_weight(weight, scaling, transposed):
        rows, columns = quantised(weight, "e4m3", lines_of_block(scaling, True), True, transposed)
        return *rows, *or_empty(columns, weight)

    @kernel(table, "fp8_linear_forward", lambda input, rows, row_scales, bias, *_: refuses(input, bias))
    def fp8_linear_forward(input, rows, row_scales, bias, scaling, transposed):
        x, columns = quantised(input, "e4m3", lines_of_block(scaling, False), True, transposed)
        output = product(x, "e4m3", (rows, row_scales), input.dtype, parameter(bias, input))
        return output, *or_empty(columns, input)

    @kernel(table, "fp8_linear_backward", lambda grad_output, *_: refuses(grad_output))
    def fp8_linear_backward(
        grad_output, input_columns, input_scales, weight_columns, weight_scales, scaling, grad_format, weight_dtype,
        main, wanted,
    ):  # fmt: skip
        dtype, block = grad_output.dtype, lines_of_block(scaling, False)
        rows, columns = NOTHING, NOTHING
        if wanted[0] or wanted[1]:
            rows, columns = quantised(grad_output, grad_format, block, wanted[0], wanted[1])
        of_input, of_weight = (input_columns, input_scales), (weight_columns, weight_scales)
        gradients = (
            (lambda: product(rows, grad_format, of_weight, dtype), dtype),
            (lambda: product(columns, grad_format, of_input, weight_dtype, out=main), weight_dtype),
            (lambda: grad_output.sum(0, dtype=torch.float32), torch.float32),
        )
        made = [
            gradient() if want else grad_output.new_empty(0, dtype=of)
            for (gradient, of), want in zip(gradients, wanted, strict=True)
        ]
        return made[0], made[1] if main is None else grad_output.new_empty(0, dtype=weight_dtype), made[2]

    return table
