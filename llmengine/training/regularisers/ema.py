"""An exponential moving average of the weights (Polyak & Juditsky 1992; Tarvainen & Valpola 2017): what is evaluated
and saved in place of the weights that the last step left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class Ema:
    """average <- d average + (1 - d) weights after each step, over the parameters that are trained.

    decay: d. warmup: d of the t-th step (from 1) is min(decay, (1 + t) / (10 + t)), so that the average soon forgets
    where training began.
    """

    def __init__(self, model: Module, decay: float, *, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self._parameters: dict[str, Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    def update(self, step: int) -> None:
        """After optimizer step `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        weights = [parameter.detach() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While entered the model has the averages, and they are held by its parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Tensors change places; none is copied, so that both come back bit for bit."""
        for name, parameter in self._parameters.items():
            parameter.data, self._averages[name] = self._averages[name], parameter.data

    def state(self) -> dict[str, Tensor]:
        return dict(self._averages)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, average in self._averages.items():
            average.copy_(tensors[name])
