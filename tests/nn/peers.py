"""torch.nn's modules as oracles: equal weights by load_state_dict in both directions, equal calls, all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module

from llmengine import nn
from llmengine.testing import assert_near

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def pair(name: str, *args, seed: int = 0, **kwargs) -> tuple[Module, Module]:
    """Our module and torch.nn's in float64, with equal weights that are perturbed: no zero biases, no unit norms."""
    torch.manual_seed(seed)
    ours, theirs = getattr(nn, name)(*args, **kwargs).double(), getattr(torch.nn, name)(*args, **kwargs).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def compare(ours: Module, theirs: Module, *args, call: Callable = Module.__call__, **kwargs) -> None:
    """Outputs, and the gradients of every parameter and floating input, in float64 and float32."""
    for dtype, tolerance in TOLERANCES.items():  # float32 last, for it rounds the weights
        expected = evaluate(theirs, args, kwargs, dtype, call)
        got = evaluate(ours, args, kwargs, dtype, call)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.isfinite().all(), f"the oracle's {name} is no oracle: {tensor}"
            assert_near(got[name], tensor, tolerance, f"{name} in {dtype}")


def evaluate(
    module: Module, args: Sequence, kwargs: dict, dtype: torch.dtype, call: Callable = Module.__call__
) -> dict[str, Tensor]:
    """Outputs and gradients by name; an input given twice stays one tensor, for self-attention looks at identity."""
    module.to(dtype).zero_grad()  # no deepcopy: it makes torch.nn's decoder layer forget an activation that is a Module
    leaves: dict[int, Tensor] = {}

    def leaf(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if id(value) not in leaves:
            leaves[id(value)] = value.detach().to(dtype).requires_grad_()
        return leaves[id(value)]

    outputs = call(module, *map(leaf, args), **{key: leaf(value) for key, value in kwargs.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    objective = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum()
        for o in outputs
        if o is not None
    )
    objective.backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs) if o is not None}
    found |= {f"gradient of input {i}": _gradient(t) for i, t in enumerate(leaves.values())}
    return found | {f"gradient of {name}": _gradient(p) for name, p in module.named_parameters()}


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forbidden(lengths: Sequence[int], length: int) -> Tensor:
    """A boolean key padding mask (batch, length), True where there is padding."""
    return torch.arange(length) >= torch.tensor(lengths)[:, None]


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    """A boolean mask, True forbids, that leaves every row its first key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[..., 0] = False
    return mask


def additive(mask: Tensor) -> Tensor:
    """A float mask of the same meaning, with finite biases on the allowed places."""
    bias = randn(*mask.shape, seed=3)
    return torch.where(mask, -torch.inf, bias)
