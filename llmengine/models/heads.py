"""Heads on the hidden states, and their losses. Each is a mean over its labels, or their sum over a given number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleDict, Parameter

from llmengine import functional
from llmengine.functional.cross_entropy import divide
from llmengine.models.config import TransformerConfig
from llmengine.models.crf import ChainField, boundaries
from llmengine.models.dtypes import as_dtype
from llmengine.models.layers import make_norm
from llmengine.models.layout import IGNORED, Layout, in_rows
from llmengine.models.smoothing import Smoothing
from llmengine.nn.feed_forward import ACTIVATIONS

_torch = torch.nn.functional
Items = Tensor | int | None
_CLASSIFIER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"dense_tanh": torch.tanh, "dense_gelu": _torch.gelu}


class Head(Protocol):
    """A head other than the token head."""

    def logits(self, layout: Layout, x: Tensor, pooled: Tensor | None) -> Tensor:
        """From the last hidden states (tokens, d_model), or the pooled tokens, to the caller's shape."""

    def loss(self, layout: Layout, logits: Tensor, labels: Tensor, items: Items) -> Tensor:
        """The mean over the labels, or their sum over `items`."""


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
    `compute_dtype`: of a head that has no parameters of its own; None: that of the hidden states. `recompute`, which
    may be set at any time: memory or speed of the loss, on GPUs (`functional.linear_cross_entropy`).
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.embed_dim if config.head_transform else config.d_model
        self.dense = None
        self.norm = None
        if config.head_transform:
            self.dense = Linear(config.d_model, width, bias=config.head_transform_bias)
            self.norm = make_norm(config, width)
        self.activation = config.activation
        self.scale, self.softcap = config.head_scale, config.logit_softcap
        self.smoothing = Smoothing(config)
        self.compute_dtype: torch.dtype | None = None
        self.recompute = True
        weight = None if config.tie_embeddings else Parameter(torch.empty(config.vocab_size, width))
        bias = Parameter(torch.empty(config.vocab_size)) if config.head_bias else None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def transform(self, x: Tensor) -> Tensor:
        own = next(self.parameters(), None)
        dtype = self.compute_dtype if own is None else own.dtype
        x = x if dtype is None else as_dtype(x, dtype)
        if self.dense is not None and self.norm is not None:
            x = self.norm(ACTIVATIONS[self.activation](self.dense(x)))
        return x if self.scale == 1.0 else x * self.scale

    def forward(self, x: Tensor, tied: Tensor) -> Tensor:
        """x (tokens, d_model) -> logits (tokens, vocab_size)."""
        x = self.transform(x)
        logits = _torch.linear(x, self._weight(tied, x.dtype), self.bias)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def loss(self, x: Tensor, tied: Tensor, labels: Tensor, items: Items) -> Tensor:
        """Sum of the negative log-likelihoods of labels (tokens,) over `items`, or over how many labels there are; in
        training with the config's label smoothing.

        Only labelled tokens go through the head, and their logits are never held. No labels: 0, zero gradients.
        """
        smoothing = self.smoothing if self.training else None
        labels = labels if smoothing is None else smoothing.labels(labels)
        x, labels = labelled(x, labels)
        x = self.transform(x)
        weight = self._weight(tied, x.dtype)
        loss = functional.linear_cross_entropy(
            x, weight, labels, linear_bias=self.bias, ignore_index=IGNORED, softcap=self.softcap, num_items=items,
            label_smoothing=smoothing.spread(len(weight)) if smoothing else 0.0, recompute=self.recompute,
        )  # fmt: skip
        if smoothing is not None and smoothing.pad is not None:
            items = (labels != IGNORED).sum() if items is None else items
            loss = loss + divide(smoothing.remainder(x, weight, self.bias, labels, self.softcap), items)
        return loss

    def each_loss(self, x: Tensor, tied: Tensor, labels: Tensor) -> Tensor:
        """(tokens,): the negative log-likelihood of every label, never smoothed; 0 where there is none."""
        rows = (labels != IGNORED).nonzero().squeeze(1)
        x = self.transform(x.index_select(0, rows))
        losses = functional.linear_cross_entropy(
            x, self._weight(tied, x.dtype), labels.index_select(0, rows), linear_bias=self.bias, reduction="none",
            softcap=self.softcap,
        )  # fmt: skip
        return losses.new_zeros(len(labels)).index_copy(0, rows, losses)

    def _weight(self, tied: Tensor, dtype: torch.dtype) -> Tensor:
        return as_dtype(tied, dtype) if self.weight is None else self.weight


class PairHead(Linear):
    """Next sentence or sentence order: two classes of the pooled token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.d_model, 2)

    def logits(self, layout: Layout, x: Tensor, pooled: Tensor | None) -> Tensor:
        assert pooled is not None  # the config asks for a pooler
        return self(pooled)

    def loss(self, layout: Layout, logits: Tensor, labels: Tensor, items: Items) -> Tensor:
        return class_loss(logits, labels.flatten(), items)


class ReplacedHead(Module):
    """ELECTRA's discriminator (Clark et al. 2020): was this token replaced? One logit per token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = Linear(config.d_model, config.d_model)
        self.out = Linear(config.d_model, 1)
        self.activation = config.activation

    def logits(self, layout: Layout, x: Tensor, pooled: Tensor | None) -> Tensor:
        return layout.leave(self.out(ACTIVATIONS[self.activation](self.dense(x)))).squeeze(-1)

    def loss(self, layout: Layout, logits: Tensor, labels: Tensor, items: Items) -> Tensor:
        """labels: 1 replaced, 0 original, IGNORED no loss; like input_ids."""
        labels = layout.labels(labels)
        keep = labels != IGNORED
        each = _torch.binary_cross_entropy_with_logits(
            wide(layout.enter(logits)), wide(labels.clamp(min=0), logits), reduction="none"
        )
        total = torch.where(keep, each, 0.0).sum()
        return divide(total, keep.sum() if items is None else items)


class Classifier(Module):
    """A summary of the sequence, a dense layer where the family has one, dropout, and `outputs` numbers."""

    def __init__(self, config: TransformerConfig, outputs: int) -> None:
        super().__init__()
        kind, d = config.classifier, config.d_model
        self.kind, self.summary, self.problem = kind, config.summary, config.problem
        self.smoothing: Smoothing | None = Smoothing(config)
        self.dense = None
        if kind.startswith("dense"):
            self.dense = Linear(d, d, bias=config.head_transform_bias or kind != "dense_norm")
        self.norm = make_norm(config, d) if kind == "dense_norm" else None
        self.out = Linear(d, outputs, bias=config.classifier_bias)
        self.activation = config.activation
        self.dropout = config.classifier_dropout

    def logits(self, layout: Layout, x: Tensor, pooled: Tensor | None) -> Tensor:
        """(sequences, outputs)."""
        x = pooled if self.kind == "pooled" and pooled is not None else getattr(layout, self.summary)(x)
        drop = self.training and self.dropout > 0
        if self.dense is not None:
            if self.kind != "dense_norm":
                x = _torch.dropout(x, self.dropout, drop)
            x = _CLASSIFIER_ACTIVATIONS.get(self.kind, ACTIVATIONS[self.activation])(self.dense(x))
        x = x if self.norm is None else self.norm(x)
        return self.out(_torch.dropout(x, self.dropout, drop))

    def loss(self, layout: Layout, logits: Tensor, labels: Tensor, items: Items) -> Tensor:
        """labels by `problem`: "single" classes (sequences,), "multi" 0 and 1 like logits, "regression" numbers like
        logits. The last two are means over all numbers of a sequence too."""
        if self.problem == "single":
            return class_loss(logits, labels.flatten(), items, self.smoothing if self.training else None)
        logits, labels = wide(logits), wide(labels.view(logits.shape), logits)
        each = (
            (logits - labels).square()
            if self.problem == "regression"
            else _torch.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        )
        return divide(each.mean(1).sum(), len(logits) if items is None else items)


class Choices(Classifier):
    """One number for each of a question's choices; the batch's sequences are choices, question by question."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, 1)
        self.problem, self.smoothing = "single", None


class Tagger(Module):
    """A class for each token; after a dense layer, activation and norm where classifier is "dense_norm".

    With a conditional random field the tags of a sequence's labelled tokens, in their order, are one outcome: -100
    (what is no word's first piece, padding) is left out of the chain. The loss is then -log p(tags) per labelled token.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, transform = config.d_model, config.classifier == "dense_norm"
        self.dense = Linear(d, d, bias=config.head_transform_bias) if transform else None
        self.norm = make_norm(config, d) if transform else None
        self.out = Linear(d, config.n_labels)
        self.chain = ChainField(config.n_labels) if config.crf else None
        self.smoothing = Smoothing(config)
        self.activation = config.activation
        self.dropout = config.classifier_dropout

    def logits(self, layout: Layout, x: Tensor, pooled: Tensor | None) -> Tensor:
        if self.dense is not None and self.norm is not None:
            x = self.norm(ACTIVATIONS[self.activation](self.dense(x)))
        return layout.leave(self.out(_torch.dropout(x, self.dropout, self.training and self.dropout > 0)))

    def loss(self, layout: Layout, logits: Tensor, labels: Tensor, items: Items) -> Tensor:
        if self.chain is None:
            smoothing = self.smoothing if self.training else None
            return class_loss(layout.enter(logits), layout.labels(labels), items, smoothing)
        labels = layout.labels(labels)
        emissions, tags = layout.enter(logits), labels.long()
        if items is None:
            items = (tags != IGNORED).sum()
        rows = (tags != IGNORED).nonzero().squeeze(1)
        cu_seqlens = boundaries(layout.sequence(rows), layout.sequences)
        return divide(self.chain.loss(emissions.index_select(0, rows), tags[rows], cu_seqlens), items)

    def tags(self, layout: Layout, logits: Tensor, among: Tensor | None) -> Tensor:
        """The most probable tags, like input_ids; -1 at padding and where `among` (like input_ids, 1 or 0) is 0: with a
        conditional random field those tokens are no part of the chain."""
        emissions = layout.enter(logits)
        chosen = torch.ones(len(emissions), dtype=torch.bool, device=logits.device)
        if among is not None:
            chosen = layout.enter(among).bool()
        rows = chosen.nonzero().squeeze(1)
        if self.chain is None:
            found = emissions.index_select(0, rows).argmax(-1)
        else:
            cu_seqlens = boundaries(layout.sequence(rows), layout.sequences)
            found = self.chain.best(emissions.index_select(0, rows), cu_seqlens)
        tags = torch.full((len(emissions),), -1, device=logits.device).index_copy(0, rows, found)
        return layout.leave(tags[:, None], padding=-1).squeeze(-1)


class SpanHead(Linear):
    """Extractive question answering: the answer's first and last token, two numbers per token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.d_model, 2)

    def logits(self, layout: Layout, x: Tensor, pooled: Tensor | None) -> Tensor:
        """Like input_ids, and 2; padding is as unlikely as can be."""
        logits = self(x)
        return layout.leave(logits, padding=torch.finfo(logits.dtype).min)

    def loss(self, layout: Layout, logits: Tensor, labels: Tensor, items: Items) -> Tensor:
        """labels (sequences, 2): first and last place of the answer, columns of the batch or, in a packed one, places
        in the sequence; outside of the text (or IGNORED): no loss."""
        if logits.dim() == 2 or len(logits) != layout.sequences:  # a packed batch: a row for each sequence
            flat = layout.enter(logits)
            sequence = layout.sequence(torch.arange(len(flat), device=flat.device))
            logits, _ = in_rows(flat, sequence, layout.sequences, padding=torch.finfo(flat.dtype).min)
        length = logits.shape[1]
        # in padding and behind a sequence there is no text either
        read = logits.detach().gather(1, labels.clamp(0, length - 1)[:, None]).squeeze(1)
        inside = (labels >= 0) & (labels < length) & (read > torch.finfo(logits.dtype).min)
        labels = torch.where(inside, labels, IGNORED)
        ends = [class_loss(logits[..., i], labels[:, i], items) for i in (0, 1)]
        return (ends[0] + ends[1]) / 2


def by_question(scores: Tensor, questions: int, choices: Tensor | None) -> Tensor:
    """A batch's scores (sequences, 1) as (questions, most choices); where a question has fewer, as unlikely as can be.

    choices: (questions,) how many each question has; None: equally many.
    """
    if choices is None:
        return scores.view(questions, -1)
    question = torch.arange(len(choices), device=scores.device).repeat_interleave(choices)
    return in_rows(scores.squeeze(1), question, len(choices), padding=torch.finfo(scores.dtype).min)[0]


def make_heads(config: TransformerConfig) -> ModuleDict:
    """The heads of all objectives but those of the token head."""
    heads = ModuleDict()
    for objective in config.objectives:
        if objective in ("nsp", "sop"):
            heads[objective] = PairHead(config)
        elif objective == "rtd":
            heads[objective] = ReplacedHead(config)
        elif objective == "classification":
            heads[objective] = Classifier(config, config.n_labels)
        elif objective == "choice":
            heads[objective] = Choices(config)
        elif objective == "tagging":
            heads[objective] = Tagger(config)
        elif objective == "qa":
            heads[objective] = SpanHead(config)
    return heads


# ---- losses ----------------------------------------------------------------------------------------------------------


def labelled(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x and their labels where there is one; all of them under torch.compile, where shapes stay."""
    if torch.compiler.is_compiling():
        return x, labels
    rows = (labels != IGNORED).nonzero().squeeze(1)
    return (x, labels) if len(rows) == len(labels) else (x.index_select(0, rows), labels.index_select(0, rows))


def class_loss(logits: Tensor, labels: Tensor, items: Items, smoothing: Smoothing | None = None) -> Tensor:
    """Sum of the negative log-likelihoods of labels (rows,), smoothed, over `items`, or over how many labels there
    are."""
    spread = smoothing.spread(logits.shape[-1]) if smoothing else 0.0
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=spread, num_items=items)


def wide(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x in float32, or in the dtype of x (of `like`) where that is wider."""
    return x.to(torch.promote_types((x if like is None else like).dtype, torch.float32))
