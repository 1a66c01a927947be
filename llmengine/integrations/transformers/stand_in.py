"""A stand-in: one method of a module, computed by our operators instead.

It is put in by giving the module a subclass of its own class with that one method replaced (as FSDP2 does): parameters,
buffers, hooks, names and state_dict stay what they are, copies of the module keep it, and its old class takes it out.

What a module computes is not guessed from its name. A stand-in is proposed for modules of a certain shape (children and
attributes of certain names) and then proven: both versions run on one random input, and where they differ the
module is left alone. A stand-in reads the parameters of leaves that it does not call, so each of its calls asks whether
they are still plain (no adapter, no hook, no sharded or quantised weight); if not, the module's own method runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.pytorch_utils import Conv1D

from llmengine.nn import fusing

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
LEAVES = (*fusing.LINEAR, *fusing.LAYER_NORM, torch.nn.Dropout, Conv1D)


@dataclass(frozen=True)
class StandIn:
    """`run(module, *args)` in the place of `module.<method>(*args)`.

    probe(module) makes arguments to prove it by. why_not(module) tells why just now the module's own method would run.
    """

    what: str
    method: str
    run: Callable
    probe: Callable[[Module], tuple]
    why_not: Callable[[Module], str | None] = lambda module: None


def put_in(module: Module, stand_in: StandIn) -> None:
    base: Any = type(module)
    module.__class__ = _subclass(base, stand_in.method, stand_in.run)


def take_out(module: Module) -> bool:
    base = type(module).__dict__.get("llmengine_base")
    if base is not None:
        module.__class__ = base
    return base is not None


def own_method(module: Module, method: str) -> Callable:
    """The module's own version of a method for which something may stand in."""
    own = getattr(type(module), "llmengine_base", type(module))
    return getattr(own, method).__get__(module)


@functools.cache
def _subclass(base: Any, method: str, run: Callable) -> type:
    # Transformers knows classes by name (checkpoints' architectures, recorded outputs): name and home stay the same
    members = {method: run, "llmengine_base": base, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), members)


def why_not_plain(**leaves: Module) -> str | None:
    """Why some of these must be called as they are, or None: a fused operator may read their parameters."""
    for name, leaf in leaves.items():
        base = type(leaf).__dict__.get("llmengine_base", type(leaf))
        if base not in LEAVES:
            return f"{name} is a {base.__name__}"
        if (reason := fusing.watched(name, leaf)) is not None:
            return reason
    return None


# ---- proof -----------------------------------------------------------------------------------------------------------


def disproof(module: Module, stand_in: StandIn) -> str | None:
    """Why the stand-in does not compute what the module does, or None where it was seen to."""
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta:
        return "it has no weights yet to prove a stand-in by"
    if "forward" in module.__dict__:
        return "its forward was replaced by somebody"
    if (reason := stand_in.why_not(module)) is not None:
        return reason
    try:
        with torch.no_grad(), _evaluating(module):
            args = stand_in.probe(module)
            expected = getattr(module, stand_in.method)(*args)
            output = stand_in.run(module, *args)
    except Exception as error:  # whatever a foreign module raises, it is not the one that this stand-in is for
        return f"it cannot be called as {stand_in.what} is: {str(error).splitlines()[0] if str(error) else error!r}"
    return _difference(expected, output)


def _difference(expected: object, output: Tensor) -> str | None:
    if not isinstance(expected, Tensor):
        return f"it returns a {type(expected).__name__}"
    if (expected.shape, expected.dtype) != (output.shape, output.dtype):
        return f"it returns {expected.dtype} {tuple(expected.shape)}, the stand-in {output.dtype} {tuple(output.shape)}"
    largest = expected.double().abs().max()
    if not (torch.isfinite(largest) and largest > 0):
        return "its output is zero or not finite, which proves nothing"
    error = ((expected.double() - output.double()).abs().max() / largest).item()
    return None if error <= TOLERANCE[expected.dtype] else f"it computes something else (off by {error:.1g})"


def noise(module: Module, *shape: int, seed: int = 0) -> Tensor:
    """A random input for a module, where and as its weights are; the global generator is left alone."""
    weight = next(module.parameters())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(weight.device, weight.dtype)


@contextlib.contextmanager
def _evaluating(module: Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
