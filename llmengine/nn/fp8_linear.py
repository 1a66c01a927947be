"""A linear layer that multiplies in 8-bit floats; its parameters stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine import functional
from llmengine.backends.fp8 import FORMATS, SCALINGS


class Fp8Linear(torch.nn.Linear):
    """torch.nn.Linear, with the same parameters and state_dict keys, by `llmengine.functional.fp8_linear`.

    Weights are kept, and updated, in their own dtype: each call rounds them anew.
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
    ) -> None:
        for option, given, allowed in (("scaling", scaling, SCALINGS), ("grad_format", grad_format, FORMATS)):
            if given not in allowed:
                raise ValueError(f"Fp8Linear: {option} {given!r} is not one of {', '.join(allowed)}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scaling, self.grad_format = scaling, grad_format

    def forward(self, input: Tensor) -> Tensor:
        return functional.fp8_linear(input, self.weight, self.bias, scaling=self.scaling, grad_format=self.grad_format)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scaling={self.scaling}, grad_format={self.grad_format}"
