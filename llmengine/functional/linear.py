"""The linear layer: our products where they are quicker than PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.backends.cpu.linear import pays
from llmengine.backends.cuda.linear import asked_for
from llmengine.functional.arguments import (
    autocast,
    check_float,
    check_same_device,
    main_grad,
    needs_grad,
    parameter_like,
)
from llmengine.ops import linear as ops
from llmengine.ops.registry import demanded, load, note

NOT_OURS = "ours run where they were measured to be quicker, or are asked for"


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input weight^T + bias, as torch.nn.functional.linear.

    Shapes: input (*, in), weight (out, in), bias (out,); the result (*, out), like input. Parameters are in input's
    dtype, or float32 beside a 16-bit input (as under autocast, which casts input alone): products are then taken in
    input's precision, without a copy of the weight, and gradients come back in each parameter's dtype.

    Our products run where they were measured to be quicker than PyTorch's: bfloat16 on a CPU with AMX, of 1024 rows and
    more, or on an Intel CPU whose AMX is hidden, of 64 and more. Elsewhere PyTorch's do, unless
    - a backend is demanded,
    - LLMENGINE_CUDA_PRODUCTS asks for ours on a GPU (no GPU has timed them; torch.compile reads it when it traces), or
    - the weight's gradient is to be added to its `main_grad` (llmengine.optim.MainGradients), which PyTorch's cannot.

    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    x, weight, bias = _checked(input, weight, bias)
    quicker = x.device.type == "cpu" and pays(x.dtype, x.shape[:-1].numel())
    main = main_grad("linear", "weight", weight)
    if quicker or demanded() is not None or asked_for(x) or (main is not None and _has_kernels(x)):
        return _products(x, weight, bias, main)
    note("linear", "PyTorch's linear", NOT_OURS)
    if torch.is_autocast_enabled(x.device.type):  # which casts, and remembers what it has cast
        return torch.nn.functional.linear(input, weight, bias)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _has_kernels(x: Tensor) -> bool:
    """Otherwise the reference would run, slowly: PyTorch's products are better, and a hook fills the buffer."""
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.bfloat16)
    return x.is_cuda and x.dtype != torch.float64 and load("cuda").unavailable is None


def products(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by the operator alone."""
    x, weight, bias = _checked(input, weight, bias)
    return _products(x, weight, bias, main_grad("linear", "weight", weight))


def _checked(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    op = "linear"
    check_float(op, "input", input)
    check_float(op, "weight", weight)
    if input.ndim == 0:
        raise ValueError(f"{op}: input has shape (); expected (*, in)")
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected (out, {input.shape[-1]})")
    (x,) = autocast(input)
    weight = parameter_like(op, "weight", weight, (weight.shape[0], input.shape[-1]), x)
    bias = parameter_like(op, "bias", bias, (weight.shape[0],), x)
    check_same_device(op, input=input, weight=weight, bias=bias)
    return x, weight, bias


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, main: Tensor | None) -> Tensor:
    tensors = (x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias)
    output = ops.Linear.apply(*tensors, main) if needs_grad(*tensors) else ops.linear_forward(*tensors)
    return output.view(*x.shape[:-1], weight.shape[0])
