"""Orders of prediction: who sees whom in a permutation, and who is predicted, from the arguments of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmengine.models.layout import IGNORED, Packed
from llmengine.models.memory import is_dense

_torch = torch.nn.functional


@dataclass(frozen=True)
class Order:
    """Who sees whom, and who is predicted; each (tokens,) or (targets,) of the packed batch, int32."""

    query_ranks: Tensor
    """A token sees keys of lower rank than this, and itself."""
    key_ranks: Tensor
    """Below 0: every token sees it."""
    targets: Tensor | None = None
    """Tokens that are predicted, sequence by sequence; None: no query stream."""
    target_layout: Packed | None = None
    hidden: Tensor | None = None
    """(batch, length, length) bool, which keys a token does not see, where that follows from no ranks."""


class NoOrder(ValueError):
    """A perm_mask that no ranks give."""


def order_of_mask(perm_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (batch, length) of queries and of keys that give a dense perm_mask (batch, length, length): 1 where row i
    does not see key j.

    What rows see are nested sets where there is an order: the keys that few rows lack come first. NoOrder where there
    is none.
    """
    hidden = perm_mask != 0
    lacking = hidden.sum(1)  # how many rows do not see the key
    key_ranks = lacking - 1  # -1: all see it
    beyond = torch.iinfo(torch.int32).max
    query_ranks = torch.where(hidden, lacking[:, None, :] - 1, beyond).amin(2)
    if not torch.equal(key_ranks[:, None, :] >= query_ranks[:, :, None], hidden):
        raise NoOrder(
            "Transformer: perm_mask follows from no order of the tokens (what rows see must be nested sets); give "
            "query_ranks and key_ranks, or a batch (batch, length) without padding"
        )
    return query_ranks.int(), key_ranks.int()


def order_of(
    layout: Packed, query_ranks: Tensor | None, key_ranks: Tensor | None, perm_mask: Tensor | None,
    target_positions: Tensor | None, target_mapping: Tensor | None,
) -> tuple[Order | None, Packed | None]:  # fmt: skip
    """The order that forward's arguments describe, and where the predicted tokens lie."""
    hidden = None
    if perm_mask is not None:
        if query_ranks is not None or key_ranks is not None:
            raise ValueError("Transformer: give perm_mask, or query_ranks and key_ranks, not both")
        try:
            query_ranks, key_ranks = order_of_mask(perm_mask)
        except NoOrder:
            if not is_dense(layout):
                raise
            hidden = perm_mask != 0
            query_ranks = torch.zeros(layout.shape, dtype=torch.int32, device=perm_mask.device)
            key_ranks = query_ranks - 1
            if tuple(hidden.shape) != (*layout.shape, layout.shape[-1]):
                raise ValueError(
                    f"Transformer: perm_mask has shape {tuple(hidden.shape)}; expected "
                    f"{(*layout.shape, layout.shape[-1])}"
                ) from None
    if (query_ranks is None) != (key_ranks is None):
        raise ValueError("Transformer: query_ranks and key_ranks go together, but only one was given")
    if target_mapping is not None:
        if target_positions is not None:
            raise ValueError("Transformer: give target_positions or target_mapping, not both")
        if not ((target_mapping != 0).sum(-1) == 1).all():
            raise ValueError("Transformer: target_mapping must have one 1 in each row: the place that is predicted")
        target_positions = target_mapping.argmax(-1)
    if query_ranks is None or key_ranks is None:
        if target_positions is None:
            return None, None
        # no order: all see all, and themselves, as Hugging Face's query stream then does
        query_ranks = torch.zeros(layout.shape, dtype=torch.int32, device=layout.cu_seqlens.device)
        key_ranks = query_ranks - 1
    for name, given in (("query_ranks", query_ranks), ("key_ranks", key_ranks)):
        if given.shape != layout.shape:
            raise ValueError(
                f"Transformer: {name} has shape {tuple(given.shape)}; expected {tuple(layout.shape)}, as input_ids"
            )
    order = Order(layout.enter(query_ranks).int(), layout.enter(key_ranks).int(), hidden=hidden)
    if target_positions is None:
        return order, None
    targets, predicted = _targets(layout, target_positions)
    return replace(order, targets=targets, target_layout=predicted), predicted


def _targets(layout: Packed, target_positions: Tensor) -> tuple[Tensor, Packed]:
    """The predicted tokens among the packed ones, and their layout in the caller's shape."""
    real = target_positions >= 0
    columns = target_positions.clamp(min=0).long()
    if len(layout.shape) == 2 and target_positions.dim() == 2 and len(target_positions) == layout.shape[0]:
        rows = torch.arange(layout.shape[0], device=columns.device)[:, None]
        all_places = (rows * layout.shape[1] + columns).flatten()
    elif target_positions.dim() == 1:
        all_places = columns
    else:
        raise ValueError(
            f"Transformer: target_positions has shape {tuple(target_positions.shape)}; expected "
            f"({layout.sequences}, targets), or (targets,) in a packed batch"
        )
    if torch.compiler.is_compiling():
        return all_places, AllTargets(target_positions.shape, _bounds(layout, all_places), real)
    places = all_places[real.flatten()]
    if len(places) == 0 or int(columns.max()) >= layout.shape[-1]:
        raise ValueError(
            f"Transformer: target_positions must name at least one token, from 0 to {layout.shape[-1] - 1}; -1: none"
        )
    if layout.indices is not None:
        inverse = places.new_full((int(layout.indices.max()) + 1,), -1)
        inverse[layout.indices] = torch.arange(len(layout.indices), device=places.device)
        places = inverse[places]
    cu_seqlens = _bounds(layout, places)
    indices = None if real.all() else real.flatten().nonzero().squeeze(1)
    return places, Packed(target_positions.shape, cu_seqlens, int(cu_seqlens.diff().max()), False, indices)


def _bounds(layout: Packed, places: Tensor) -> Tensor:
    """cu_seqlens of tokens that are named sequence by sequence."""
    sequences = torch.arange(layout.sequences + 1, device=places.device)
    return torch.searchsorted(layout.sequence(places), sequences).int()


class AllTargets(Packed):
    """Predicted tokens under torch.compile, where shapes must not depend on data: a place that names none (-1) is
    computed as column 0, has no label, and gives zeros."""

    def __init__(self, shape: torch.Size, cu_seqlens: Tensor, real: Tensor) -> None:
        super().__init__(shape, cu_seqlens, shape[-1], False)
        self.real = real.flatten()

    def leave(self, x: Tensor, padding: float = 0.0) -> Tensor:
        return super().leave(torch.where(self.real[:, None], x, padding))

    def labels(self, labels: Tensor) -> Tensor:
        return torch.where(self.real, labels.flatten(), IGNORED)
