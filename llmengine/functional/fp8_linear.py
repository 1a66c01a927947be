"""The linear layer with products of 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.fp8 import FORMATS, SCALINGS
from llmengine.functional.arguments import (
    autocast,
    check_float,
    check_same_device,
    main_grad,
    needs_grad,
    parameter_like,
)
from llmengine.ops import fp8_linear as ops


class Fp8Weight:
    """A weight's 8-bit numbers, which `fp8_linear(..., kept=)` makes at its first call and again when the weight has
    changed: whoever calls several times between two steps of the optimizer (micro-batches, checkpointing's second
    forward, evaluation) rounds the weight once. Two bytes a number are held, one where no gradient passed to the input.

    Changes are those that autograd knows of (`Tensor._version`, or another memory): by operators, optimizers and
    load_state_dict. Of one by way of `.data` only `clear()` tells, and of FSDP's, which fills a weight's memory anew
    without a new version: do not keep weights there, or clear after every step. Nothing is kept under torch.compile nor
    while a CUDA graph is captured, which would go on with the numbers of its capture.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def clear(self) -> None:
        self._kept = None

    def numbers(self, weight: Tensor, scaling: str, transposed: bool) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or weight.is_inference() or _is_captured(weight):
            return ops.fp8_weight(weight, scaling, transposed)
        kept = self._kept  # another thread may replace it
        if kept is None or not kept.serves(weight, scaling, transposed):
            kept = self._kept = None  # before room for others is taken
            version = weight._version
            with torch.inference_mode(False):  # else they would serve no backward
                numbers = ops.fp8_weight(weight, scaling, transposed)
            kept = self._kept = _Kept(weight, version, scaling, transposed, numbers)
        return kept.numbers

    def __reduce__(self):
        return Fp8Weight, ()  # a copy is another weight's


@dataclass(frozen=True)
class _Kept:
    weight: Tensor
    version: int
    scaling: str
    transposed: bool
    numbers: tuple[Tensor, ...]

    def serves(self, weight: Tensor, scaling: str, transposed: bool) -> bool:
        alike = (weight.dtype, weight.device) == (self.weight.dtype, self.weight.device)
        unchanged = alike and weight.is_set_to(self.weight) and weight._version == self.version
        return unchanged and scaling == self.scaling and transposed <= self.transposed


def _is_captured(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def fp8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: str = "tensor",
    grad_format: str = "e5m2",
    kept: Fp8Weight | None = None,
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

    kept: where the weight's numbers stay until it changes (`Fp8Weight`); None: each call makes them. The gradient of a
    weight with a `main_grad` (llmengine.optim.MainGradients) is added to that by the product that makes it.

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
    gradients = needs_grad(tokens, weight, bias)
    make = ops.fp8_weight if kept is None else kept.numbers
    numbers = make(weight.detach(), scaling, gradients and tokens.requires_grad)
    if gradients:
        main = main_grad(op, "weight", weight)
        output = ops.Fp8Linear.apply(tokens, weight, bias, *numbers, scaling, grad_format, main)
    else:
        output = ops.fp8_linear_forward(tokens, *numbers[:2], bias, scaling, False)[0]
    return output.view(*x.shape[:-1], weight.shape[0])
