"""Heads on the hidden states: tokens (masked or next), pooled sentence pairs; and their losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from llmengine import functional
from llmengine.models.config import TransformerConfig
from llmengine.models.layout import IGNORED
from llmengine.nn.feed_forward import ACTIVATIONS
from llmengine.nn.norm import LayerNorm


class Pooler(Module):
    """tanh(dense(first token))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = Linear(config.d_model, config.d_model)

    def forward(self, first: Tensor) -> Tensor:
        return self.dense(first).tanh()


class TokenHead(Module):
    """Scores over the vocabulary: (dense, activation, norm,) output embedding (+ bias).

    A tied output embedding belongs to the word embedding and is given to each call; an untied one is `weight`.
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        transform = config.head_transform
        self.dense = Linear(config.d_model, config.d_model) if transform else None
        self.norm = LayerNorm(config.d_model, config.norm_eps) if transform else None
        self.activation = config.activation
        weight = None if config.tie_embeddings else Parameter(torch.empty(config.vocab_size, config.d_model))
        bias = Parameter(torch.empty(config.vocab_size)) if config.head_bias else None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def transform(self, x: Tensor) -> Tensor:
        if self.dense is None or self.norm is None:
            return x
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))

    def forward(self, x: Tensor, tied: Tensor) -> Tensor:
        """x (tokens, d_model) -> logits (tokens, vocab_size)."""
        return torch.nn.functional.linear(self.transform(x), self._weight(tied), self.bias)

    def loss(self, x: Tensor, tied: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Sum of the negative log-likelihoods of labels (tokens,) over `items`, or over how many labels there are.

        Only labelled tokens go through the head, and their logits are never held. No labels: 0, zero gradients.
        """
        if items is None:
            items = (labels != IGNORED).sum().clamp(min=1)
        if not torch.compiler.is_compiling():
            labelled = (labels != IGNORED).nonzero().squeeze(1)
            if len(labelled) < len(labels):
                x, labels = x.index_select(0, labelled), labels.index_select(0, labelled)
        total = functional.linear_cross_entropy(
            self.transform(x), self._weight(tied), labels, linear_bias=self.bias, ignore_index=IGNORED, reduction="sum"
        )
        return divide(total, items)

    def _weight(self, tied: Tensor) -> Tensor:
        return tied if self.weight is None else self.weight


def sequence_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """Sum of the negative log-likelihoods of labels (sequences,) over `items`, or over how many labels there are."""
    if items is None:
        items = (labels != IGNORED).sum().clamp(min=1)
    return divide(functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), items)


def divide(total: Tensor, items: Tensor | int) -> Tensor:
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
