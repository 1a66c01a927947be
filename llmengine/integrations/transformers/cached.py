"""Generation by Transformers' `generate`: new tokens behind keys and values that its cache holds.

Its caches have one row per sequence and one column per token, padding too; so this layout keeps all places, and masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from llmengine import functional
from llmengine.models.layout import Scores


class Columns:
    """All batch * new places of a decoder's batch that continues what `cache` holds; it sees that and itself.

    ids (batch, new); attention_mask (batch, past + new) or None: no padding; source_mask (batch, source): which of the
    encoder's places are real.
    """

    def __init__(
        self, ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, source_mask: Tensor | None = None
    ) -> None:
        batch, new = ids.shape
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + new):
            raise ValueError(
                f"Llmengine: attention_mask has shape {tuple(attention_mask.shape)}; expected {(batch, past + new)}: "
                f"{past} places of the cache and {new} new ones"
            )
        self.shape, self.total, self.source_mask = ids.shape, past + new, source_mask
        self.real = None if attention_mask is None else attention_mask.bool()
        self.crossing = cache if isinstance(cache, EncoderDecoderCache) else None
        self.cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        columns = torch.arange(self.total, device=ids.device).expand(batch, -1)
        places = columns if self.real is None else (self.real.long().cumsum(1) - 1).clamp(min=0)
        self.positions = places[:, past:].flatten()
        """(batch * new,): each token's place among the tokens of its row."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float, scores: Scores) -> Tensor:
        k, v = self._by_row(k), self._by_row(v)
        if self.cache is not None:
            k, v = (x[:, :, : self.total] for x in self.cache.update(k, v, layer))
        real = None if self.real is None else self.real[:, None, None, :]
        return self._attend(q, k, v, real, dropout_p, scores, causal="bottom_right")

    def attend_memory(
        self, q: Tensor, project: Callable[[], tuple[Tensor, Tensor]], layer: int, dropout_p: float, scores: Scores
    ) -> Tensor:
        cross = self.crossing
        if cross is not None and cross.is_updated.get(layer):
            kept: Any = cross.cross_attention_cache.layers[layer]
            k, v = kept.keys, kept.values
        else:
            k, v = map(self._by_row, project())
            if cross is not None:
                k, v = cross.cross_attention_cache.update(k, v, layer)
                cross.is_updated[layer] = True
        real = None if self.source_mask is None else self.source_mask.bool()[:, None, None, :]
        return self._attend(q, k, v, real, dropout_p, scores)

    def _by_row(self, x: Tensor) -> Tensor:
        """(batch * length, heads, head_dim) -> (batch, heads, length, head_dim)."""
        return x.unflatten(0, (self.shape[0], -1)).transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, dropout_p: float, scores: Scores,
        causal: str | None = None,
    ) -> Tensor:  # fmt: skip
        options = scores.options(causal is not None) | {"causal": causal}
        output = functional.scaled_dot_product_attention(
            self._by_row(q), k, v, real, dropout_p, enable_gqa=True, **options
        )
        return output.transpose(1, 2).flatten(0, 1)
