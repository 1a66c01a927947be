"""Where the tokens of a batch lie. Inside the model hidden states are (tokens, d_model), without padding.

A layout takes the caller's (batch, length) tensors in at the door (`enter`), gives results back in the caller's shape
(`leave`), and knows how tokens attend each other (`attend`). Generation has layouts of its own, with a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmengine import functional

IGNORED = -100  # a label that asks for no loss


@dataclass(frozen=True)
class Scores:
    """What a layer does to its scores."""

    scale: float
    softcap: float = 0.0
    window: int | None = None
    """Tokens to either side (to the left, where causal) that a token sees besides itself; None: no bound."""
    alibi_slopes: Tensor | None = None
    distance_bias: Tensor | None = None
    """(heads, 2 reach + 1), see `functional.varlen_attention`."""

    def options(self, causal: bool) -> dict[str, Any]:
        """As the attention functions name them."""
        window = (-1, -1) if self.window is None else (self.window, 0 if causal else self.window)
        options = {
            "scale": self.scale, "softcap": self.softcap, "window_size": window, "alibi_slopes": self.alibi_slopes,
        }  # fmt: skip
        return options if self.distance_bias is None else {**options, "distance_bias": self.distance_bias}


class Attending(Protocol):
    """What a layer needs of a layout."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float, scores: Scores) -> Tensor:
        """q (tokens, heads, head_dim), k, v (tokens, key heads, head_dim) -> like q."""

    def attend_memory(
        self, q: Tensor, project: Callable[[], tuple[Tensor, Tensor]], layer: int, dropout_p: float, scores: Scores
    ) -> Tensor:
        """q of a decoder's tokens; `project` gives keys and values of all the encoder's tokens -> like q."""


class Packed:
    """Sequences one after another, no padding: sequence s holds tokens cu_seqlens[s] to cu_seqlens[s + 1].

    `indices` (tokens,) are the tokens' places among the caller's batch * length ones; None: all of them, in order.
    """

    def __init__(
        self, shape: tuple[int, ...], cu_seqlens: Tensor, max_seqlen: int, causal: bool, indices: Tensor | None = None
    ) -> None:
        self.shape = shape
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.causal = causal
        self.indices = indices
        self.memory: Packed | None = None
        """A decoder's: where the encoder's tokens lie, sequence by sequence."""

    def enter(self, x: Tensor) -> Tensor:
        """(*shape, ...) -> (tokens, ...)."""
        x = x.flatten(0, len(self.shape) - 1)
        return x if self.indices is None else x.index_select(0, self.indices)

    def leave(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """(tokens, d) -> (*shape, d), with `padding` where there is padding."""
        if self.indices is not None:
            places = x.new_full((math.prod(self.shape), x.shape[1]), padding)
            x = places.index_copy(0, self.indices, x)
        return x.view(*self.shape, x.shape[1])

    def positions(self, of_tokens: bool = False) -> Tensor:
        """(tokens,): a token's column in the caller's batch; in a packed batch, or `of_tokens`, its place in its
        sequence."""
        if self.indices is not None and not of_tokens:
            return self.indices % self.shape[-1]
        tokens = torch.arange(self.tokens, device=self.cu_seqlens.device)
        return tokens - self.cu_seqlens[:-1].long()[self.sequence(tokens)]

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def tokens(self) -> int:
        return math.prod(self.shape) if self.indices is None else len(self.indices)

    def sequence(self, tokens: Tensor) -> Tensor:
        """The sequences in which these tokens lie."""
        return torch.bucketize(tokens, self.cu_seqlens[1:], right=True)

    def labels(self, labels: Tensor) -> Tensor:
        """(*shape) -> (tokens,). Padding has no labels."""
        return self.enter(labels)

    def next_labels(self, labels: Tensor) -> Tensor:
        """(*shape) -> (tokens,): at each token the label of the next one in its sequence, at the last one none."""
        labels = self.labels(labels).roll(-1)
        return labels.index_fill(0, (self.cu_seqlens[1:].long() - 1).remainder(max(len(labels), 1)), IGNORED)

    def first(self, x: Tensor) -> Tensor:
        """(tokens, d) -> (sequences, d): the first token of each sequence."""
        return x.index_select(0, self.cu_seqlens[:-1])

    def last(self, x: Tensor) -> Tensor:
        """(tokens, d) -> (sequences, d): the last token of each sequence."""
        return x.index_select(0, self.cu_seqlens[1:] - 1)

    def mean(self, x: Tensor) -> Tensor:
        """(tokens, d) -> (sequences, d): the mean over each sequence."""
        sums = x.new_zeros(len(self.cu_seqlens) - 1, x.shape[1])
        sums = sums.index_add(0, self.sequence(torch.arange(len(x), device=x.device)), x)
        return sums / self.cu_seqlens.diff().to(x.dtype)[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float, scores: Scores) -> Tensor:
        """Tokens see their own sequence only."""
        return functional.varlen_attention(
            q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen,
            dropout_p=dropout_p, is_causal=self.causal, **scores.options(self.causal),
        )  # fmt: skip

    def attend_memory(
        self, q: Tensor, project: Callable[[], tuple[Tensor, Tensor]], layer: int, dropout_p: float, scores: Scores
    ) -> Tensor:
        """Tokens see the whole of their own sequence's source."""
        assert self.memory is not None
        return functional.varlen_attention(
            q, *project(), self.cu_seqlens, self.memory.cu_seqlens, self.max_seqlen, self.memory.max_seqlen,
            dropout_p=dropout_p, **scores.options(causal=False),
        )  # fmt: skip


class Padded:
    """All batch * length places, padding too: shapes do not depend on data, which torch.compile(fullgraph) needs."""

    def __init__(self, attention_mask: Tensor, causal: bool) -> None:
        self.shape = attention_mask.shape
        self.real = attention_mask.bool()
        self.causal = causal
        self.sequences = self.shape[0]
        """Number of rows."""
        self.memory: Padded | None = None

    def enter(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def leave(self, x: Tensor, padding: float = 0.0) -> Tensor:
        return torch.where(self.real.view(-1, 1), x, padding).view(*self.shape, x.shape[1])

    def positions(self, of_tokens: bool = False) -> Tensor:
        if of_tokens:
            return (self.real.long().cumsum(1) - 1).clamp(min=0).flatten()
        return torch.arange(self.shape[1], device=self.real.device).repeat(self.shape[0])

    def sequence(self, tokens: Tensor) -> Tensor:
        return tokens // self.shape[1]

    def labels(self, labels: Tensor) -> Tensor:
        return torch.where(self.real, labels, IGNORED).flatten()

    def next_labels(self, labels: Tensor) -> Tensor:
        labels = self.labels(labels).view(self.shape)
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return self.labels(following)

    def first(self, x: Tensor) -> Tensor:
        first = self.real.int().argmax(1) + torch.arange(self.shape[0], device=x.device) * self.shape[1]
        return x.index_select(0, first)

    def last(self, x: Tensor) -> Tensor:
        length = self.shape[1]
        last = length - 1 - self.real.flip(1).int().argmax(1) + torch.arange(self.shape[0], device=x.device) * length
        return x.index_select(0, last)

    def mean(self, x: Tensor) -> Tensor:
        real = self.real.to(x.dtype)[:, None, :]
        return (real @ x.view(*self.shape, -1)).squeeze(1) / real.sum(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float, scores: Scores) -> Tensor:
        return self._attend(q, k, v, self, dropout_p, self.causal, scores)

    def attend_memory(
        self, q: Tensor, project: Callable[[], tuple[Tensor, Tensor]], layer: int, dropout_p: float, scores: Scores
    ) -> Tensor:
        assert self.memory is not None
        return self._attend(q, *project(), self.memory, dropout_p, False, scores)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Padded, dropout_p: float, causal: bool, scores: Scores
    ) -> Tensor:
        q = q.unflatten(0, self.shape).transpose(1, 2)
        k, v = (x.unflatten(0, keys.shape).transpose(1, 2) for x in (k, v))
        output = functional.scaled_dot_product_attention(
            q, k, v, keys.real[:, None, None, :], dropout_p, is_causal=causal, enable_gqa=True,
            **scores.options(causal),
        )  # fmt: skip
        return output.transpose(1, 2).flatten(0, 1)


Layout = Packed | Padded


def dense(shape: torch.Size, device: torch.device, causal: bool) -> Packed:
    """A batch without padding: every row is a whole sequence."""
    batch, length = shape
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return Packed(shape, cu_seqlens, length, causal)


def unpadded(attention_mask: Tensor, causal: bool) -> Packed:
    """The tokens where attention_mask (batch, length) is 1, row by row; rows may be padded on any side."""
    real = attention_mask.bool()
    indices = real.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    everything = len(indices) == real.numel()
    return Packed(real.shape, cu_seqlens, real.shape[1], causal, None if everything else indices)


def in_rows(x: Tensor, sequence: Tensor, sequences: int, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """x (n, ...) whose rows belong to `sequence` (n,), rising, as (sequences, longest, ...) with `padding` behind, and
    the lengths (sequences,)."""
    lengths = torch.bincount(sequence, minlength=sequences)
    longest = max(int(lengths.max()) if len(lengths) else 0, 1)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1]
    place = sequence * longest + torch.arange(len(x), device=x.device) - starts[sequence]
    rows = x.new_full((sequences * longest, *x.shape[1:]), padding).index_copy(0, place, x)
    return rows.unflatten(0, (sequences, longest)), lengths
