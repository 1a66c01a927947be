"""What a model says where a batch has labels, as distributions, and how far two models' are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmengine.data.examples import IGNORED
from llmengine.models import Transformer, TransformerConfig
from llmengine.models.inputs import Tokens
from llmengine.models.layout import in_rows
from llmengine.models.output import TransformerOutput
from llmengine.models.transformer import COUNTED

_torch = torch.nn.functional
_IMPOSSIBLE = -1e4  # a logarithm of 0 that can be subtracted
Kind = Literal["classes", "yes or no", "number"]


@dataclass(frozen=True)
class Judged:
    """logits (rows, outputs): of classes that exclude each other, of several that do not, or numbers.

    counted: what the head's loss is divided by. labels: how many it has here. share: what a row counts.
    """

    logits: Tensor
    kind: Kind
    counted: str
    labels: int
    share: float = 1.0

    def divergence(self, other: Judged, items: Mapping[str, Any] | int | None, temperature: float = 1.0) -> Tensor:
        """The Kullback-Leibler divergence KL(self | other), summed over rows and divided by the step's labels (None:
        this batch's). Numbers are the means of normal distributions of variance 1; where a row has several outputs that
        do not exclude each other, it is their mean. temperature: what logits are divided by."""
        p, q = (logits.float() / temperature for logits in (self.logits, other.logits))
        if self.kind == "number":
            rows = (p - q).square().mean(1) / 2
        elif self.kind == "yes or no":
            rows = sum(_torch.logsigmoid(s * p).exp() * (_torch.logsigmoid(s * p) - _torch.logsigmoid(s * q))
                       for s in (1, -1)).mean(1)  # type: ignore[union-attr]  # fmt: skip
        else:
            # what is impossible to one, as padding is, may be minus infinity to both
            p, q = (logits.log_softmax(1).clamp(min=_IMPOSSIBLE) for logits in (p, q))
            rows = (p.exp() * (p - q)).sum(1)
        count = max(self.labels, 1) if items is None else items[self.counted] if isinstance(items, Mapping) else items
        return rows.sum() * self.share / count


def check_has_distribution(config: TransformerConfig, who: str) -> None:
    """That `judged` can say something of this model."""
    if len(config.objectives) != 1 or config.objectives[0] in ("rtd", "nsp", "sop"):
        raise ValueError(f"{who} needs a model with one head that is no pretraining pair; this one has "
                         f"{', '.join(config.objectives) or 'none'}")  # fmt: skip
    if config.crf:
        raise ValueError(
            f"{who} compares the tags of single tokens; a crf judges whole sequences: leave one of them out"
        )


def judged(model: Transformer, out: TransformerOutput, batch: Mapping[str, Any]) -> Judged:
    """What the model's only head says of a micro-batch, where that has labels. out: the model's output."""
    config = model.config
    (head,) = config.objectives
    counted = COUNTED.get(head, "tokens")
    if head == "qa":
        return _spans(out, batch, counted)
    labels = batch["labels"]
    if head == config.token_task:
        return _tokens(model, out, batch, counted)
    logits = out.head_logits[head]
    if head == "classification" and config.problem != "single":
        return Judged(logits, "number" if config.problem == "regression" else "yes or no", counted, len(logits))
    labels = labels.flatten()
    rows = (labels != IGNORED).nonzero().squeeze(1)
    return Judged(logits.reshape(len(labels), -1).index_select(0, rows), "classes", counted, len(rows))


def _tokens(model: Transformer, out: TransformerOutput, batch: Mapping[str, Any], counted: str) -> Judged:
    """Of the token head: only labelled tokens go through it."""
    labels, config = batch["labels"], model.config
    assert out.last_hidden_state is not None
    if config.causal:
        tokens = Tokens(
            batch["input_ids"], batch.get("attention_mask"), batch.get("cu_seqlens"), batch.get("max_seqlen")
        )
        layout = tokens.layout(config, causal=True)
        labels, hidden = layout.next_labels(labels), layout.enter(out.last_hidden_state)
    else:
        labels, hidden = labels.flatten(), out.last_hidden_state.flatten(0, -2)  # type: ignore[union-attr]
    rows = (labels != IGNORED).nonzero().squeeze(1)
    assert model.token_head is not None
    return Judged(model.token_head(hidden.index_select(0, rows), model.words.weight), "classes", counted, len(rows))


def _spans(out: TransformerOutput, batch: Mapping[str, Any], counted: str) -> Judged:
    """Of extractive answers: where they begin, and where they end; each counts a half."""
    logits, labels = [], 0
    for name in ("start", "end"):
        scores, places = getattr(out, f"{name}_logits"), batch[f"{name}_positions"].flatten()
        lengths = scores.new_full((len(places),), scores.shape[-1])
        if (bounds := batch.get("cu_seqlens")) is not None:  # a row for each sequence
            tokens = torch.arange(scores.numel(), device=scores.device)
            sequence = torch.bucketize(tokens, bounds[1:], right=True)
            padding = torch.finfo(scores.dtype).min
            scores, lengths = in_rows(scores.flatten(), sequence, len(places), padding=padding)
        inside = ((places >= 0) & (places < lengths)).nonzero().squeeze(1)
        logits.append(scores.index_select(0, inside))
        labels = len(inside)
    return Judged(torch.cat(logits), "classes", counted, labels, share=0.5)
