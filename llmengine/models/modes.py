"""Modes of a model that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[torch.device]:
    """No dropout and no gradients within; gives the model's device. model: a Transformer, or a module with `words`."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model.words.weight.device
    finally:
        model.train(was_training)
