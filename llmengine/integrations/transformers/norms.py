"""Norms: PyTorch's LayerNorm, and the layer and RMS norms that every family writes anew, by weight or by 1 + weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from llmengine import functional
from llmengine.integrations.transformers.stand_in import StandIn, noise, own_method

EPSILONS = ("eps", "variance_epsilon")


def stand_ins(module: Any) -> Iterator[StandIn]:
    """For a leaf with one line of weights and an epsilon; which norm it is, the proof says."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or _epsilon(module) is None:
        return
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None:
        return
    if [name for name, _ in module.named_parameters()] in (["weight"], ["weight", "bias"]):
        yield from STAND_INS


def _epsilon(module: Any) -> Any:
    """Under whatever name; None where there is none."""
    return next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)


def _takes(module: Module, x: Tensor) -> bool:
    """Our operators take weights in the input's dtype or in float32; each module has its own rules beyond that."""
    return module.weight.dtype in (x.dtype, torch.float32) and type(module.weight) in (Tensor, torch.nn.Parameter)


def _norm(subtract_mean: bool, about_one: bool) -> StandIn:
    def forward(self: Any, input: Tensor, *more, **options) -> Tensor:
        if more or options or not _takes(self, input):
            return own_method(self, "forward")(input, *more, **options)
        weight = 1.0 + self.weight.float() if about_one else self.weight
        if subtract_mean:
            return functional.layer_norm(input, weight.shape, weight, getattr(self, "bias", None), _epsilon(self))
        return functional.rms_norm(input, weight.shape, weight, _epsilon(self))

    name = ("layer norm" if subtract_mean else "RMS norm") + (" with weight 1 + w" if about_one else "")
    return StandIn(name, "forward", forward, _probe)


def _probe(module: Any) -> tuple[Tensor]:
    return (noise(module, 3, *module.weight.shape) * 2.0 + 0.5,)


STAND_INS = (_norm(True, False), _norm(False, False), _norm(False, True), _norm(True, True))
