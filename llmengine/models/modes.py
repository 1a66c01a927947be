"""Modes of a model that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module


@contextmanager
def resting(model: Module) -> Iterator[None]:
    """No dropout within. Then each module trains again that did before: a part that someone put to eval() stays so."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(model: Any) -> Iterator[torch.device]:
    """No dropout and no gradients within; gives the model's device. model: a Transformer, or a module with `words`."""
    with resting(model), torch.no_grad():
        yield model.words.weight.device
