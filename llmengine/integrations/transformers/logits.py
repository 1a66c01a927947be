"""Logits that are not computed: the loss of a language model's head without its (tokens, vocabulary) logits.

Every model ends in `logits = head(hidden)`, then perhaps a bias, a scale or a softcap, then `cross_entropy` of them and
the labels. Rather than write each model's forward again, we let its own run on a stand-in for the logits, which
remembers where they come from and answers the operations between head and loss symbolically. PyTorch's `cross_entropy`
of it is our `linear_cross_entropy`; anything else that is done with it computes the logits first, once, and goes on
with those. So the model's own rules for its loss (shift, num_items_in_batch, ignored labels) hold to the letter, and
who reads `output.logits` has them, and pays for them then.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_map

from llmengine import functional
from llmengine.integrations.transformers.stand_in import StandIn, own_method
from llmengine.nn.fusing import touched

F = torch.nn.functional


@dataclass(frozen=True)
class Recipe:
    """logits = scale (hidden weight^T + bias); or, where `cap` is given, cap tanh of that."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    cap: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.hidden.shape[:-1], self.weight.shape[0]

    def logits(self, dtype: torch.dtype) -> Tensor:
        like = self.hidden.dtype
        bias = None if self.bias is None else self.bias.to(like)
        with torch.enable_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            logits = F.linear(self.hidden, self.weight.to(like), bias)
            if self.scale != 1.0:
                logits = logits * self.scale
            if self.cap is not None:
                logits = torch.tanh(logits) * self.cap
            return logits.to(dtype)


class DeferredLogits(Tensor):
    """Shape, dtype and device of logits, and the recipe for them."""

    recipe: Recipe
    computed: Tensor | None

    @staticmethod
    def __new__(cls, recipe: Recipe, dtype: torch.dtype) -> DeferredLogits:
        self = Tensor._make_wrapper_subclass(cls, recipe.shape, dtype=dtype, device=recipe.hidden.device)
        self.recipe, self.computed = recipe, None
        return self

    def compute(self) -> Tensor:
        if self.computed is None:
            self.computed = self.recipe.logits(self.dtype)
        return self.computed

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        symbolic = SYMBOLIC.get(function)
        first = args[0] if args else kwargs.get("input")
        if (
            symbolic is not None and isinstance(first, cls) and first.computed is None
        ):  # else they may have been changed
            answer = symbolic(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        return function(*tree_map(_computed, args), **tree_map(_computed, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        return function(*tree_map(_computed, args), **tree_map(_computed, kwargs or {}))


def _computed(value: Any) -> Any:
    return value.compute() if isinstance(value, DeferredLogits) else value


METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__]
)

# ---- what may happen between head and loss ---------------------------------------------------------------------------


def _view(logits: DeferredLogits, *shape, **options) -> Any:
    try:
        wanted = torch.empty(logits.shape, device="meta").view(*shape, **options).shape
    except (RuntimeError, TypeError):
        return NotImplemented
    recipe = logits.recipe
    if wanted[-1:] != logits.shape[-1:]:
        return NotImplemented
    hidden = recipe.hidden.reshape(*wanted[:-1], recipe.hidden.shape[-1])
    return DeferredLogits(replace(recipe, hidden=hidden), logits.dtype)


def _same(logits: DeferredLogits, **options) -> Any:
    return NotImplemented if options else logits


def _float(logits: DeferredLogits, **options) -> Any:
    return NotImplemented if options else DeferredLogits(logits.recipe, torch.float32)


def _add(logits: DeferredLogits, bias: Any, **options) -> Any:
    recipe = logits.recipe
    if (
        options
        or recipe.scale != 1.0
        or recipe.cap is not None
        or type(bias) not in (Tensor, torch.nn.Buffer, Parameter)
    ):
        return NotImplemented
    classes = logits.shape[-1]
    if bias.ndim > logits.ndim or tuple(bias.shape) != (*(1,) * (bias.ndim - 1), classes):
        return NotImplemented
    bias = bias.reshape(classes)
    return DeferredLogits(replace(recipe, bias=bias if recipe.bias is None else recipe.bias + bias), logits.dtype)


def _multiply(logits: DeferredLogits, factor: Any, **options) -> Any:
    if options or isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return NotImplemented
    recipe = logits.recipe
    if recipe.cap is None:
        return DeferredLogits(replace(recipe, scale=recipe.scale * factor), logits.dtype)
    return DeferredLogits(replace(recipe, cap=recipe.cap * factor), logits.dtype)


def _divide(logits: DeferredLogits, divisor: Any, **options) -> Any:
    if not isinstance(divisor, (int, float)) or divisor == 0:
        return NotImplemented
    return _multiply(logits, 1.0 / divisor, **options)


def _tanh(logits: DeferredLogits) -> Any:
    if logits.recipe.cap is not None:
        return NotImplemented
    return DeferredLogits(replace(logits.recipe, cap=1.0), logits.dtype)


def _cross_entropy(
    input: DeferredLogits, target: Tensor, weight: Tensor | None = None, size_average=None, ignore_index: int = -100,
    reduce=None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    recipe = input.recipe
    softcap = 0.0 if recipe.cap is None else recipe.cap
    known = softcap == 0.0 or math.isclose(recipe.scale * softcap, 1.0, rel_tol=1e-12)
    if not known or input.ndim > 2 or target.is_floating_point() or (size_average, reduce) != (None, None):
        return NotImplemented
    hidden, bias = recipe.hidden, recipe.bias
    if softcap == 0.0 and recipe.scale != 1.0:
        hidden, bias = hidden * recipe.scale, None if bias is None else bias * recipe.scale
    with torch.autocast(hidden.device.type, enabled=False):
        return functional.linear_cross_entropy(
            hidden, recipe.weight, target, linear_bias=bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip


SYMBOLIC: dict[Callable, Callable] = {
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.contiguous: _same,
    Tensor.float: _float,
    Tensor.add: _add,
    Tensor.__add__: _add,
    torch.add: _add,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    torch.mul: _multiply,
    Tensor.div: _divide,
    Tensor.__truediv__: _divide,
    torch.div: _divide,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    F.tanh: _tanh,
    F.cross_entropy: _cross_entropy,
}

# ---- the model -------------------------------------------------------------------------------------------------------


@functools.cache
def stand_in(base: Any) -> StandIn:
    """For a model that computes its loss from its output embeddings' logits, where labels are given in training."""

    @functools.wraps(base.forward)  # Trainer reads the signature
    def forward(self: Any, *args, **kwargs):
        run = own_method(self, "forward")
        wanted = kwargs.get("labels") is not None and self.training and torch.is_grad_enabled()
        if not wanted or torch.compiler.is_compiling() or touched(head=(head := self.get_output_embeddings())):
            return run(*args, **kwargs)
        with _deferring(head):
            return run(*args, **kwargs)

    return StandIn("loss of the LM head, its logits never held in training", "forward", forward, lambda module: ())


@contextlib.contextmanager
def _deferring(head: Module) -> Iterator[None]:
    head.forward = types.MethodType(_defer, head)
    try:
        yield
    finally:
        head.__dict__.pop("forward", None)


def _defer(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    elif hidden.dtype != head.weight.dtype:
        return F.linear(hidden, head.weight, head.bias)  # an error of the model's, in its own words
    return DeferredLogits(Recipe(hidden, head.weight, head.bias), hidden.dtype)
