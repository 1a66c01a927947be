"""A linear-chain conditional random field over tags (Lafferty et al. 2001): exact loss and best sequence.

score(tags) = start[tag_1] + sum_t emission[t, tag_t] + sum_t transition[tag_t, tag_t+1] + end[tag_n]. The loss is the
log of the sum of exp(score) over all sequences, by the forward algorithm in float32, minus the score of the right one.
A batch's steps run together: (sequences, tags) at a time, or (sequences, tags, tags) of transitions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class ChainField(Module):
    """Transitions between `tags` tags, and what a sequence begins and ends with."""

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.transition = Parameter(torch.empty(tags, tags))
        """[from, to]"""
        self.start = Parameter(torch.empty(tags))
        self.end = Parameter(torch.empty(tags))

    def loss(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """Sum over sequences of -log p(tags); emissions (sequences, longest, K), tags (sequences, longest), lengths
        (sequences,). A sequence of length 0 adds 0."""
        emissions = emissions.to(torch.promote_types(emissions.dtype, torch.float32))
        return (self._partition(emissions, lengths) - self._score(emissions, tags, lengths)).sum()

    def _partition(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """(sequences,): log of the sum over all tag sequences."""
        transition = self.transition.to(emissions.dtype)
        alpha = self.start + emissions[:, 0]
        for t in range(1, emissions.shape[1]):
            following = torch.logsumexp(alpha[:, :, None] + transition, 1) + emissions[:, t]
            alpha = torch.where((lengths > t)[:, None], following, alpha)
        return torch.where(lengths > 0, torch.logsumexp(alpha + self.end, 1), 0.0)

    def _score(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """(sequences,): of the given tags."""
        steps = torch.arange(emissions.shape[1], device=tags.device)
        here = steps < lengths[:, None]
        tags = torch.where(here, tags, 0)
        emitted = emissions.gather(2, tags[:, :, None]).squeeze(2)
        moved = self.transition.to(emissions.dtype)[tags[:, :-1], tags[:, 1:]]
        last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
        total = torch.where(here, emitted, 0.0).sum(1) + torch.where(here[:, 1:], moved, 0.0).sum(1)
        return torch.where(lengths > 0, total + self.start[tags[:, 0]] + self.end[last], 0.0)

    @torch.no_grad()
    def best(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """The most probable tags (sequences, longest), by Viterbi's algorithm; -1 beyond a sequence's length."""
        emissions = emissions.to(torch.promote_types(emissions.dtype, torch.float32))
        transition = self.transition.to(emissions.dtype)
        best, pointers = self.start + emissions[:, 0], []
        stay = torch.arange(emissions.shape[2], device=emissions.device).expand(len(emissions), -1)
        for t in range(1, emissions.shape[1]):
            value, come_from = (best[:, :, None] + transition).max(1)
            on = (lengths > t)[:, None]
            best = torch.where(on, value + emissions[:, t], best)
            pointers.append(torch.where(on, come_from, stay))
        tag = (best + self.end).argmax(1)
        tags = [tag]
        for come_from in reversed(pointers):
            tag = come_from.gather(1, tag[:, None]).squeeze(1)
            tags.append(tag)
        found = torch.stack(tags[::-1], 1)
        return torch.where(torch.arange(found.shape[1], device=found.device) < lengths[:, None], found, -1)


def in_rows(x: Tensor, sequence: Tensor, sequences: int, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """x (n, ...) whose rows belong to `sequence` (n,), rising, as (sequences, longest, ...) with `padding` behind, and
    the lengths (sequences,)."""
    lengths = torch.bincount(sequence, minlength=sequences)
    longest = max(int(lengths.max()) if len(lengths) else 0, 1)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1]
    place = sequence * longest + torch.arange(len(x), device=x.device) - starts[sequence]
    rows = x.new_full((sequences * longest, *x.shape[1:]), padding).index_copy(0, place, x)
    return rows.unflatten(0, (sequences, longest)), lengths
