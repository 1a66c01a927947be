"""A linear layer that multiplies in 8-bit floats; its parameters stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from llmengine import functional
from llmengine.backends.fp8 import FORMATS, SCALINGS


class Fp8Linear(torch.nn.Linear):
    """torch.nn.Linear, with the same parameters and state_dict keys, by `llmengine.functional.fp8_linear`.

    Weights are kept, and updated, in their own dtype: each call rounds them anew or, with `keep_weight`, only the first
    one after they have changed (`llmengine.functional.Fp8Weight`): memory for speed, which may be set at any time.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        scaling: str = "tensor",
        grad_format: str = "e5m2",
        keep_weight: bool = False,
    ) -> None:
        for option, given, allowed in (("scaling", scaling, SCALINGS), ("grad_format", grad_format, FORMATS)):
            if given not in allowed:
                raise ValueError(f"Fp8Linear: {option} {given!r} is not one of {', '.join(allowed)}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scaling, self.grad_format, self.keep_weight = scaling, grad_format, keep_weight
        self.kept = functional.Fp8Weight()

    def forward(self, input: Tensor) -> Tensor:
        return functional.fp8_linear(
            input,
            self.weight,
            self.bias,
            scaling=self.scaling,
            grad_format=self.grad_format,
            kept=self.kept if self.keep_weight else None,
        )

    def extra_repr(self) -> str:
        options = f"scaling={self.scaling}, grad_format={self.grad_format}, keep_weight={self.keep_weight}"
        return f"{super().extra_repr()}, {options}"


def keep_fp8_weights(model: Module, on: bool = True) -> None:
    """Whether every Fp8Linear of a model keeps its weight's 8-bit numbers until the weight changes."""
    for leaf in model.modules():
        if isinstance(leaf, Fp8Linear):
            leaf.keep_weight = on
            leaf.kept.clear()
