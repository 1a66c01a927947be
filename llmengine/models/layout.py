"""Where the tokens of a batch lie. Inside the model hidden states are (tokens, d_model), without padding.

A layout takes the caller's (batch, length) tensors in at the door (`enter`), gives results back in the caller's shape
(`leave`), and knows how tokens attend each other (`attend`). Generation has layouts of its own, with a cache.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from llmengine import functional

IGNORED = -100  # a label that asks for no loss


class Attending(Protocol):
    """What a layer needs of a layout."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float) -> Tensor:
        """q, k, v (tokens, heads, head_dim) -> like q."""


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

    def enter(self, x: Tensor) -> Tensor:
        """(*shape, ...) -> (tokens, ...)."""
        x = x.flatten(0, len(self.shape) - 1)
        return x if self.indices is None else x.index_select(0, self.indices)

    def leave(self, x: Tensor) -> Tensor:
        """(tokens, d) -> (*shape, d), zeros where there is padding."""
        if self.indices is not None:
            places = x.new_zeros(math.prod(self.shape), x.shape[1])
            x = places.index_copy(0, self.indices, x)
        return x.view(*self.shape, x.shape[1])

    def positions(self) -> Tensor:
        """(tokens,): a token's column in the caller's batch; in a packed batch its place in its sequence."""
        if self.indices is not None:
            return self.indices % self.shape[-1]
        tokens = torch.arange(math.prod(self.shape), device=self.cu_seqlens.device)
        sequence = torch.bucketize(tokens, self.cu_seqlens[1:], right=True)
        return tokens - self.cu_seqlens[:-1].long()[sequence]

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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float) -> Tensor:
        """q, k, v (tokens, heads, head_dim) -> like q; tokens see their own sequence only."""
        return functional.varlen_attention(
            q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen,
            dropout_p=dropout_p, is_causal=self.causal,
        )  # fmt: skip


class Padded:
    """All batch * length places, padding too: shapes do not depend on data, which torch.compile(fullgraph) needs."""

    def __init__(self, attention_mask: Tensor, causal: bool) -> None:
        self.shape = attention_mask.shape
        self.real = attention_mask.bool()
        length = self.shape[1]
        self.mask = self.real[:, None, None, :]
        if causal:
            self.mask = self.mask & self.mask.new_ones(length, length).tril()

    def enter(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def leave(self, x: Tensor) -> Tensor:
        return (x * self.real.view(-1, 1)).view(*self.shape, x.shape[1])

    def positions(self) -> Tensor:
        return torch.arange(self.shape[1], device=self.real.device).repeat(self.shape[0])

    def labels(self, labels: Tensor) -> Tensor:
        return torch.where(self.real, labels, IGNORED).flatten()

    def next_labels(self, labels: Tensor) -> Tensor:
        labels = self.labels(labels).view(self.shape)
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return self.labels(following)

    def first(self, x: Tensor) -> Tensor:
        first = self.real.int().argmax(1) + torch.arange(self.shape[0], device=x.device) * self.shape[1]
        return x.index_select(0, first)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float) -> Tensor:
        q, k, v = (x.unflatten(0, self.shape).transpose(1, 2) for x in (q, k, v))
        output = functional.scaled_dot_product_attention(q, k, v, self.mask, dropout_p)
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
