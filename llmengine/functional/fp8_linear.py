"""The linear layer with products of 8-bit floats."""

from __future__ import annotations

from torch import Tensor

from llmengine.backends.fp8 import FORMATS, SCALINGS
from llmengine.functional.arguments import autocast, check_float, check_same_device, needs_grad, parameter_like
from llmengine.ops import fp8_linear as ops


def fp8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: str = "tensor",
    grad_format: str = "e5m2",
) -> Tensor:
    """input weight^T + bias, as torch.nn.functional.linear, of numbers that are rounded to 8-bit floats.

    Shapes and dtypes are those of `llmengine.functional.linear`: input (*, in), weight (out, in), bias (out,), the
    result (*, out), like input. Input and weight become e4m3 (relative error of a number at most 2^-4, where it is not
    below 2^-6 of its scale), the gradient of the result `grad_format`, "e5m2" (at most 2^-3, over a wider range) or
    "e4m3"; products are summed, and results and gradients kept, as by `linear`.

    scaling: "tensor": each matrix has one scale, by which its largest finite magnitude becomes the format's largest
    number (448; e5m2 57344). "block": input and gradients have one for each 128 numbers along what is summed over, the
    weight one for each 128 x 128: an outlier costs its block alone. Scales are those of the call's own tensors
    ("current scaling"). A magnitude below 2^-110 counts as that; infinities and NaN become NaN.

    Hopper's tensor cores multiply (csrc/cuda/fp8_product_sm90a.cu); elsewhere the reference rounds to the same numbers
    and multiplies in float32, which shows what training with them would be, and is slow.

    Raises ValueError on shapes, dtypes, devices or options that do not fit.
    """
    op = "fp8_linear"
    check_float(op, "input", input)
    check_float(op, "weight", weight)
    if input.ndim == 0:
        raise ValueError(f"{op}: input has shape (); expected (*, in)")
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected (out, {input.shape[-1]})")
    for argument, given, allowed in (("scaling", scaling, SCALINGS), ("grad_format", grad_format, FORMATS)):
        if given not in allowed:
            raise ValueError(f"{op}: {argument} is {given!r}; allowed: {', '.join(map(repr, allowed))}")
    (x,) = autocast(input)
    weight = parameter_like(op, "weight", weight, (weight.shape[0], input.shape[-1]), x)
    bias = parameter_like(op, "bias", bias, (weight.shape[0],), x)
    check_same_device(op, input=input, weight=weight, bias=bias)
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if needs_grad(tokens, weight, bias):
        output = ops.Fp8Linear.apply(tokens, weight, bias, scaling, grad_format)
    else:
        output = ops.fp8_linear_forward(tokens, weight, bias, scaling, [False, False])[0]
    return output.view(*x.shape[:-1], weight.shape[0])
