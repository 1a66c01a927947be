"""The fast gradient method for text (Miyato et al. 2017): each step is taken on the embeddings as they are, and on
embeddings that are moved a little in the direction that makes the loss worst."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Embedding


class Fgm:
    """Moves the word embedding by epsilon g / |g|, g being its gradient over the whole step (equations 5 and 6, of the
    table instead of one text's vectors: the step's micro-batches then change nothing)."""

    def __init__(self, words: Embedding, epsilon: float) -> None:
        if not words.weight.requires_grad:
            raise ValueError("fgm moves the word embedding along its gradient, but that is frozen here; leave it out")
        self.words, self.epsilon = words, epsilon

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """While entered the embedding is moved; then it is what it was, bit for bit. No gradient: not moved."""
        weight, gradient = self.words.weight, self.words.weight.grad
        if gradient is None:
            yield
            return
        before = weight.detach().clone()
        norm = gradient.norm()
        with torch.no_grad():
            weight.add_(torch.where(norm > 0, gradient * (self.epsilon / norm), 0.0))
        try:
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)
