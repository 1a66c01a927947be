"""When may a fused operator read the parameters of leaf modules instead of calling them?

Parameters live in ordinary leaves (nn.Linear, LayerNorm; and Dropout), which adapters, quantisers, sharding and hooks
replace or watch. A fused operator may stand in only for leaves that nobody touched; otherwise the leaves are called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmengine import functional
from llmengine.backends.cpu.linear import FROM_ROWS
from llmengine.backends.cuda.linear import asked_for
from llmengine.functional.linear import NOT_OURS
from llmengine.nn.norm import LayerNorm, OffsetRMSNorm, RMSNorm
from llmengine.ops.registry import demanded, load, note

LINEAR = (torch.nn.Linear, NonDynamicallyQuantizableLinear)
LAYER_NORM = (LayerNorm, torch.nn.LayerNorm)
RMS_NORM = (RMSNorm, OffsetRMSNorm)
_OWN = frozenset((*LINEAR, *LAYER_NORM, *RMS_NORM, torch.nn.Dropout))


def touched(**leaves: Module) -> str | None:
    """Why some of these leaves must be called as they are, or None: all are plain and may be fused."""
    for name, leaf in leaves.items():
        if type(leaf) not in _OWN:
            return f"{name} is a {type(leaf).__name__}"
        if (reason := watched(name, leaf)) is not None:
            return reason
    return None


def watched(name: str, leaf: Module) -> str | None:
    """Why a leaf, though of a known type, must be called as it is, or None."""
    if leaf._forward_hooks or leaf._forward_pre_hooks or leaf._backward_hooks or leaf._backward_pre_hooks:
        return f"{name} has hooks"
    if "forward" in leaf.__dict__:
        return f"{name}'s forward was replaced"
    weight = getattr(leaf, "weight", None)
    if weight is not None and type(weight) not in (Parameter, Tensor):
        return f"{name}'s weight is a {type(weight).__name__}"
    return None


def linear(leaf: Module, input: Tensor) -> Tensor:
    """leaf(input), by our products where they are quicker or asked for, or add the weight's gradient to its buffer.
    A demand for a backend asks for them where that has linear layers; one without leaves them to PyTorch."""
    backend, why = demanded(), NOT_OURS
    if backend is not None:
        ours, why = load(backend).has("linear_forward"), f"the {backend} backend has no linear layers"
    else:
        buffer = getattr(getattr(leaf, "weight", None), "main_grad", None)
        ours = FROM_ROWS is not None or asked_for(input) or buffer is not None
    if ours and isinstance(leaf, torch.nn.Linear) and touched(linear=leaf) is None:
        return functional.linear(input, leaf.weight, leaf.bias)
    note("linear", "PyTorch's linear" if type(leaf) in LINEAR else f"a {type(leaf).__name__}", why)
    return leaf(input)


def projection() -> Callable[..., Tensor]:
    """linear(input, weight, bias): ours to choose, but PyTorch's where a backend without linear layers is demanded."""
    backend = demanded()
    return functional.linear if backend is None or load(backend).has("linear_forward") else torch.nn.functional.linear


def add_norm(input: Tensor, residual: Tensor, norm: Module, dropout_p: float) -> tuple[Tensor, Tensor]:
    """new_residual = residual + dropout(input); returns (norm(new_residual), new_residual), in one kernel if it may."""
    if isinstance(norm, LAYER_NORM) and touched(norm=norm) is None:
        return functional.add_layer_norm(
            input, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p
        )
    if isinstance(norm, RMS_NORM) and touched(norm=norm) is None:
        return functional.add_rms_norm(
            input, residual, norm.normalized_shape, norm.gain(), norm.eps, dropout_p=dropout_p
        )
    new_residual = residual + torch.nn.functional.dropout(input, dropout_p, dropout_p > 0)
    return norm(new_residual), new_residual
