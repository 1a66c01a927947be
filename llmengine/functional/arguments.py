"""Checks and casts that the public operators share. A message names operator, argument, the given and the allowed.

What is right is found so by few questions, since small operators' calls consist of them; words are found afterwards.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a torch.Tensor, got {type(value).__name__}")


def check_float(op: str, argument: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        check_tensor(op, argument, value)
    if value.dtype not in FLOATS:
        allowed = ", ".join(map(short, FLOATS))
        raise ValueError(f"{op}: {argument} has dtype {short(value.dtype)}; allowed: {allowed}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """The first tensor must be given."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            first = next(iter(tensors))
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first} is on {device}; all must share one device"
            )


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    first, *rest = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in rest:
        if tensor.dtype != first[1].dtype:
            raise ValueError(
                f"{op}: {name} has dtype {short(tensor.dtype)} but {first[0]} has {short(first[1].dtype)}; "
                "they must be equal"
            )


def check_probability(op: str, argument: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: {argument} must lie in [0, 1), got {p}")


def check_boundaries(op: str, argument: str, value: Tensor) -> None:
    """Boundaries of packed sequences. What they say is checked by the kernels that can read them (CPU)."""
    check_tensor(op, argument, value)
    if value.dtype != torch.int32 or value.ndim != 1 or value.shape[0] == 0:
        raise ValueError(
            f"{op}: {argument} must be int32 of shape (sequences + 1,), got {short(value.dtype)} {tuple(value.shape)}"
        )


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def as_rows(input: Tensor, columns: int) -> Tensor:
    """(rows, columns). A reshape costs a microsecond or two, which packed batches, so already, need not pay."""
    return input if input.ndim == 2 and input.shape[1] == columns else input.reshape(-1, columns)


def flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, the operands of matrix products in its dtype; otherwise as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def main_grad(op: str, argument: str, weight: Tensor | None) -> Tensor | None:
    """The buffer that whoever makes the gradient of `weight` is to add it to: its `main_grad` (optim/main_grad.py).

    None where there is none, or no gradient is asked for, or it goes by autograd: of a weight that is no leaf or has
    hooks, which are given the gradient and may give another, and under torch.compile.
    """
    main = None if weight is None else getattr(weight, "main_grad", None)
    if weight is None or main is None or not (torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf):
        return None
    if torch.compiler.is_compiling() or weight._backward_hooks:
        return None
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    fits = main.shape == weight.shape and main.dtype == wide and main.device == weight.device and main.is_contiguous()
    if not fits or main.requires_grad:
        raise ValueError(
            f"{op}: {argument}.main_grad is {short(main.dtype)} {tuple(main.shape)} on {main.device}, strides "
            f"{main.stride()}; expected a contiguous {short(wide)} {tuple(weight.shape)} on {weight.device} that takes "
            "no gradient"
        )
    return main


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 (1,), from PyTorch's generator of that device: torch.manual_seed governs it."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


Parameter = TypeVar("Parameter", Tensor, Tensor | None)


def parameter_like(op: str, argument: str, parameter: Parameter, shape: tuple[int, ...], input: Tensor) -> Parameter:
    """A weight or bias of that shape, in input's dtype or float32; under autocast other floats are cast to input's."""
    if parameter is None:
        return None
    if isinstance(parameter, Tensor) and parameter.dtype == input.dtype and parameter.shape == shape:
        return parameter
    check_float(op, argument, parameter)
    if parameter.shape != shape:
        raise ValueError(f"{op}: {argument} has shape {tuple(parameter.shape)}; expected {shape}")
    if parameter.dtype == torch.float32 and input.dtype != torch.float64:
        return parameter
    if torch.is_autocast_enabled(input.device.type) and torch.float64 not in (parameter.dtype, input.dtype):
        return parameter.to(input.dtype)
    raise ValueError(
        f"{op}: {argument} has dtype {short(parameter.dtype)}; allowed: that of input ({short(input.dtype)})"
        + ("" if input.dtype in (torch.float32, torch.float64) else " or float32")
    )
