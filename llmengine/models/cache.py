"""Keys and values kept between the steps of a generation, and the layouts by which layers meet them.

Prompts may be padded on either side. They are unpadded at the door, and a sequence's n-th token lies in slot n of its
row of the cache: there is no padding inside, and every position is the token's place in its own sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from llmengine import functional
from llmengine.models.config import TransformerConfig
from llmengine.models.inputs import Tokens
from llmengine.models.layout import Packed, Scores


def packed_prompts(tokens: Tokens, config: TransformerConfig, causal: bool) -> Packed:
    """Where the tokens of generate's arguments lie."""
    packed = tokens.layout(config, causal=causal)
    if not isinstance(packed, Packed) or torch.compiler.is_compiling():
        raise RuntimeError("generate: torch.compile may trace forward, but not generate; call it uncompiled")
    return packed


class Cache:
    """Keys and values of each layer that has written some, (batch, key heads, slots, head_dim), of that layer's dtype:
    what a head reads lies in one piece. Row b holds lengths[b] tokens; slots behind them hold anything."""

    def __init__(self, lengths: Tensor, slots: int) -> None:
        self.lengths = lengths
        self.slots = slots
        self.keys: dict[Hashable, Tensor] = {}
        self.values: dict[Hashable, Tensor] = {}

    def write(self, layer: Hashable, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for kept, x in ((self.keys, k), (self.values, v)):
            if layer not in kept:
                kept[layer] = x.new_empty(len(self.lengths), x.shape[1], self.slots, x.shape[2])
            kept[layer][rows, :, slots] = x

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was: repeats prompts for beams, reorders beams."""
        self.keys = {layer: keys.index_select(0, rows) for layer, keys in self.keys.items()}
        self.values = {layer: values.index_select(0, rows) for layer, values in self.values.items()}
        self.lengths = self.lengths.index_select(0, rows)


class Source:
    """What an encoder made of the sources, and each decoder layer's keys and values of it, projected once.

    Beams of one source lie next to each other and share them.
    """

    def __init__(self, packed: Packed, memory: Tensor) -> None:
        self.packed = packed
        self.memory = memory
        self.projected: dict[int, tuple[Tensor, Tensor]] = {}
        # packed tokens are pages of one slot each
        self.lengths = packed.cu_seqlens.diff()
        places = torch.arange(packed.max_seqlen, dtype=torch.int32, device=packed.cu_seqlens.device)
        self.pages = packed.cu_seqlens[:-1, None] + places

    def attend(self, q: Tensor, project: Callable[[], tuple[Tensor, Tensor]], layer: int, scores: Scores) -> Tensor:
        """q (tokens, heads, head_dim), equally many tokens of every source, each of which sees all of it."""
        if layer not in self.projected:
            self.projected[layer] = project()
        keys, values = (x.unsqueeze(1) for x in self.projected[layer])
        # what the tokens of a source, its beams, ask is asked by as many more heads
        asked = q.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)
        answered = functional.decode_attention(
            asked.flatten(1, 2).unsqueeze(2), keys, values, self.lengths, self.pages, **scores.options(causal=True)
        )
        return answered.view(*asked.shape[:3], -1).transpose(1, 2).flatten(0, 1)


class Prompt:
    """The layout of the prompts' pass: packed sequences, whose keys and values are kept."""

    def __init__(self, packed: Packed, cache: Cache, source: Source | None) -> None:
        self.packed = packed
        self.cache = cache
        self.source = source
        tokens = torch.arange(packed.tokens, device=packed.cu_seqlens.device)
        self.rows = packed.sequence(tokens)
        self.slots = tokens - packed.cu_seqlens[:-1].long()[self.rows]
        if source is not None:
            packed.memory = source.packed

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float, scores: Scores) -> Tensor:
        self.cache.write(layer, self.rows, self.slots, k, v)
        return self.packed.attend(q, k, v, layer, dropout_p, scores)

    def attend_memory(
        self, q: Tensor, project: Callable[[], tuple[Tensor, Tensor]], layer: int, dropout_p: float, scores: Scores
    ) -> Tensor:
        assert self.source is not None
        self.source.projected[layer] = keys_and_values = project()
        return self.packed.attend_memory(q, lambda: keys_and_values, layer, dropout_p, scores)

    def last(self, x: Tensor) -> Tensor:
        return self.packed.last(x)


class Step:
    """The layout of one more token per sequence, which sees the cache and itself."""

    def __init__(self, cache: Cache, source: Source | None) -> None:
        self.cache = cache
        self.source = source
        self.slots = cache.lengths
        self.rows = torch.arange(len(self.slots), device=self.slots.device)
        cache.lengths = cache.lengths + 1
        self.lengths = cache.lengths.int()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float, scores: Scores) -> Tensor:
        self.cache.write(layer, self.rows, self.slots, k, v)
        return functional.decode_attention(
            q.unsqueeze(2), self.cache.keys[layer], self.cache.values[layer], self.lengths,
            **scores.options(causal=True),
        ).squeeze(2)  # fmt: skip

    def attend_memory(
        self, q: Tensor, project: Callable[[], tuple[Tensor, Tensor]], layer: int, dropout_p: float, scores: Scores
    ) -> Tensor:
        assert self.source is not None
        return self.source.attend(q, project, layer, scores)

    def last(self, x: Tensor) -> Tensor:
        return x
