"""R-Drop (Liang et al. 2021): two passes with different dropout are to say the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.nn import Embedding, Module

from llmengine.models import Transformer, TransformerConfig
from llmengine.models.output import TransformerOutput
from llmengine.objectives.distributions import check_has_distribution, judged


class RDrop(Module):
    """loss = (L1 + L2) / 2 + alpha / 2 (KL(p1 | p2) + KL(p2 | p1)), over labelled tokens or sequences.

    Equation 4, but that its first term is a sum: it is a mean here, so that the loss is of the usual size. Without
    training: the model itself.
    """

    def __init__(self, model: Module, transformer: Transformer, alpha: float) -> None:
        """model: what is called, `transformer` or a module around it. alpha: what the distance counts."""
        super().__init__()
        check_has_distribution(transformer.config, "r_drop")
        self.model = model
        self._transformer = (transformer,)  # a tuple: its weights belong to `model`
        self.alpha = alpha

    @property
    def config(self) -> TransformerConfig:
        return self._transformer[0].config

    @property
    def words(self) -> Embedding:
        return self._transformer[0].words

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        self._transformer[0].save_pretrained(directory)

    def forward(self, *, num_items_in_batch: Mapping[str, Any] | None = None, **batch: Any) -> TransformerOutput:
        """As the model. losses: its own, each the mean of both passes, and "r_drop", the distance times alpha."""
        one = self.model(**batch, num_items_in_batch=num_items_in_batch)
        if not self.training:
            return one
        other = self.model(**batch, num_items_in_batch=num_items_in_batch)
        p, q = (judged(self._transformer[0], out, batch) for out in (one, other))
        distance = self.alpha / 2 * (p.divergence(q, num_items_in_batch) + q.divergence(p, num_items_in_batch))
        losses = {head: (loss + other.losses[head]) / 2 for head, loss in one.losses.items()}
        return one.with_loss((one.loss + other.loss) / 2 + distance, {**losses, "r_drop": distance})
