"""Sample cases: one record per operator, from which the general laws, tests and benchmarks draw their inputs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmengine.ops.registry import backend as on_backend


@dataclass
class Sample:
    """Arguments of one call, in float64; a test rounds them to its dtype."""

    name: str
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    constants: tuple[str | int, ...] = ()  # floating arguments (position or keyword) that take no gradient
    float32_stays: tuple[str | int, ...] = ()  # floating arguments that are float32 whatever the dtype (ALiBi slopes)

    def rounded(self, dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = lambda x: x, only=None) -> Sample:
        """The same call with floats rounded to `dtype`, `layout` applied (to the argument `only`, or to all)."""

        def convert(key, value):
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                value = value.to(torch.float32 if key in self.float32_stays and dtype != torch.float64 else dtype)
            return layout(value) if only is None or key == only else value.clone()

        args = tuple(convert(i, a) for i, a in enumerate(self.args))
        return Sample(
            self.name, args, {k: convert(k, v) for k, v in self.kwargs.items()}, self.constants, self.float32_stays
        )

    def on(self, device: str) -> Sample:
        """The same call with its tensors on that device."""

        def move(value):
            return value.to(device) if isinstance(value, Tensor) else value

        kwargs = {k: move(v) for k, v in self.kwargs.items()}
        return Sample(self.name, tuple(map(move, self.args)), kwargs, self.constants, self.float32_stays)

    def tensors(self) -> dict[str | int, Tensor]:
        named = dict(enumerate(self.args)) | self.kwargs
        return {key: value for key, value in named.items() if isinstance(value, Tensor)}

    def differentiable(self) -> list[str | int]:
        """The arguments that take a gradient."""
        return [k for k, t in self.tensors().items() if t.is_floating_point() and k not in self.constants]


@dataclass
class Operator:
    """A public operator for the laws of tests/test_ops.py.

    `samples()` makes its cases from a seeded generator; `plain` is the same function in plain PyTorch, the peer in
    precision (None: the reference backend in that dtype, where PyTorch has no such operator or other random numbers).
    `rounds`: it is piecewise constant, and its gradient that of what it rounds: no difference of values shows it.
    It runs the nodes <node>_forward and <node>_backward, or, where it has no gradient (`inference`, and `of_optim`:
    llmengine.optim), the node <node> alone; a backend that has them has the operator.
    """

    name: str
    function: Callable
    samples: Callable[[], list[Sample]]
    plain: Callable | None = None
    node: str = ""
    of_optim: bool = False
    inference: bool = False
    rounds: bool = False

    def __post_init__(self) -> None:
        self.node = self.node or self.name

    def nodes(self) -> set[str]:
        return {self.node} if self.of_optim or self.inference else {f"{self.node}_forward", f"{self.node}_backward"}


def all_operators() -> list[Operator]:
    """The OPERATORS of every module in llmengine.testing.samples."""
    package = importlib.import_module("llmengine.testing.samples")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return [operator for module in modules for operator in module.OPERATORS]


def evaluate(
    function: Callable, sample: Sample, backend: str | None, upstream: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[Tensor], dict[str | int, Tensor]]:
    """Outputs and all gradients of one call; random upstream gradients, equal in every precision, unless given."""
    tensors = sample.tensors()
    leaves = {key: tensors[key].detach().requires_grad_() for key in sample.differentiable()}
    args = [leaves.get(i, a) for i, a in enumerate(sample.args)]
    kwargs = {k: leaves.get(k, v) for k, v in sample.kwargs.items()}
    torch.manual_seed(1234)  # the dropout seed is drawn from PyTorch's generator: the same for every backend
    if backend is None:
        outputs = function(*args, **kwargs)
    else:
        with on_backend(backend):
            outputs = function(*args, **kwargs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    differentiable = [o for o in outputs if o.requires_grad]
    if not differentiable:
        return outputs, {}
    generator = torch.Generator().manual_seed(99)
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in differentiable]
    gradients = [upstream(o) if upstream else g.to(o) for o, g in zip(differentiable, gradients, strict=True)]
    with on_backend(backend) if backend else _nothing():
        found = torch.autograd.grad(differentiable, list(leaves.values()), gradients, allow_unused=True)
    return (
        [o.detach() for o in outputs],
        {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(leaves, found, strict=True)},
    )


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None
