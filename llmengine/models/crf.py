"""A linear-chain conditional random field over tags (Lafferty et al. 2001): exact loss and best sequence.

score(tags) = start[tag_1] + sum_t emission[t, tag_t] + sum_t transition[tag_t, tag_t+1] + end[tag_n]. Loss and search
are the operators `functional.chain_field_loss` and `chain_field_decode`, of sequences packed without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from llmengine import functional


class ChainField(Module):
    """Transitions between `tags` tags, and what a sequence begins and ends with."""

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.transition = Parameter(torch.empty(tags, tags))
        """[from, to]"""
        self.start = Parameter(torch.empty(tags))
        self.end = Parameter(torch.empty(tags))

    def loss(self, emissions: Tensor, tags: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Sum over sequences of -log p(tags); emissions (tokens, K), tags (tokens,), cu_seqlens int32 (sequences + 1,):
        sequence s holds the tokens cu_seqlens[s] to cu_seqlens[s + 1]. A sequence of length 0 adds 0."""
        losses = functional.chain_field_loss(emissions, tags, self.transition, self.start, self.end, cu_seqlens)
        return losses.sum()

    @torch.no_grad()
    def best(
        self,
        emissions: Tensor,
        cu_seqlens: Tensor,
        allowed: Tensor | None = None,
        begins: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """The most probable tags (tokens,), by Viterbi's algorithm, among those that obey the given constraints, all
        boolean: allowed (K, K), [from, to], which tag may follow which; begins and ends (K,), with which a sequence may
        begin and end. -1 in a sequence for which they leave none."""
        return functional.chain_field_decode(
            emissions, _only(allowed, self.transition), _only(begins, self.start), _only(ends, self.end), cu_seqlens
        )


def _only(allowed: Tensor | None, scores: Tensor) -> Tensor:
    """-inf where not allowed."""
    if allowed is None:
        return scores
    if allowed.dtype != torch.bool or allowed.shape != scores.shape:
        raise ValueError(
            f"best: constraints must be bool of shape {tuple(scores.shape)}, got {allowed.dtype} {tuple(allowed.shape)}"
        )
    return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


def boundaries(sequence: Tensor, sequences: int) -> Tensor:
    """cu_seqlens (sequences + 1,) of rows that belong to `sequence` (n,), rising."""
    lengths = torch.bincount(sequence, minlength=sequences)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
