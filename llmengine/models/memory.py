"""Transformer-XL's memory: what a segment's tokens were in each layer, for the segment behind it (Dai et al. 2019).

Sequences of a batch may remember unequally much, or nothing: memory is packed like everything inside the model, and the
keys of a sequence are what it remembers and then its own tokens. Nothing of it has gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llmengine.models.config import TransformerConfig
from llmengine.models.layout import Packed


@dataclass(frozen=True)
class Memory:
    """What the sequences of a batch remember: `mems` of a packed or padded batch.

    states: for each layer (remembered tokens, d_model), what entered it, sequence after sequence.
    lengths: how many of them each sequence has; 0: it begins anew.
    """

    states: tuple[Tensor, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of_rows(cls, mems: Sequence[Tensor]) -> Memory:
        """From Hugging Face's form: for each layer (length, batch, d_model)."""
        length, batch = mems[0].shape[:2]
        return cls(tuple(past.transpose(0, 1).flatten(0, 1) for past in mems), (length,) * batch)

    def rows(self) -> list[Tensor]:
        """The inverse of `of_rows`, for sequences that remember equally much."""
        return [past.unflatten(0, (len(self.lengths), -1)).transpose(0, 1) for past in self.states]

    @classmethod
    def join(cls, parts: Sequence[Tensor | None], empty: Tensor) -> Memory:
        """Of each sequence's (layers, tokens, d_model), None: nothing. empty (layers, 0, d_model): like them."""
        each = [empty if part is None else part for part in parts]
        return cls(torch.cat(each, 1).unbind(0), tuple(part.shape[1] for part in each))

    def split(self) -> list[Tensor]:
        """Each sequence's (layers, tokens, d_model), a copy."""
        return [torch.stack(parts) for parts in zip(*(s.split(self.lengths) for s in self.states), strict=True)]


class Recall:
    """Where the keys of one pass lie: each sequence's memory, `past` of them, and then its `tokens`."""

    def __init__(self, layout: Packed, memory: Memory | None) -> None:
        self._layout = layout
        self._tokens: tuple[int, ...] | None = None
        self.past = (0,) * layout.sequences if memory is None else memory.lengths

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of each sequence; asked for where something is remembered only, as it may have to be read from a GPU."""
        layout = self._layout
        if self._tokens is None and layout.max_seqlen * layout.sequences == layout.tokens:
            self._tokens = (layout.max_seqlen,) * layout.sequences
        elif self._tokens is None:
            self._tokens = tuple(layout.cu_seqlens.diff().tolist())
        return self._tokens

    @property
    def lengths(self) -> list[int]:
        """Keys of each sequence."""
        return [past + tokens for past, tokens in zip(self.past, self.tokens, strict=True)]

    @property
    def longest(self) -> int:
        """The most keys of a sequence, or a bound of it."""
        return max(self.lengths) if any(self.past) else self._layout.max_seqlen

    def behind(self, past: Tensor | None, x: Tensor) -> Tensor:
        """(keys, ...): each sequence's part of `past` (remembered tokens, ...), and then its tokens (tokens, ...)."""
        if past is None:
            return x
        pairs = zip(past.to(x.dtype).split(self.past), x.split(self.tokens), strict=True)
        return torch.cat([part for pair in pairs for part in pair])

    def behind_each(self, value: int, x: Tensor) -> Tensor:
        """The same of numbers (tokens,), where all that is remembered has this one."""
        return self.behind(x.new_full((sum(self.past),), value) if any(self.past) else None, x)

    def next(self, config: TransformerConfig) -> tuple[slice, ...]:
        """Of all keys, those that each sequence remembers then: memory, and a segment's first memory_reuse tokens; of
        both the last memory_length."""
        kept = []
        begins = accumulate(self.lengths, initial=0)
        for begin, past, tokens in zip(begins, self.past, self.tokens, strict=False):
            end = past + min(tokens, config.memory_reuse or tokens)
            first = max(0, end - config.memory_length) if config.memory_length else 0
            kept.append(slice(begin + first, begin + end))
        return tuple(kept)


def check_memory(config: TransformerConfig, layout: Packed, mems: Sequence[Tensor] | Memory | None) -> Memory | None:
    """forward's argument, in either form; ValueError where it does not fit the batch."""
    if mems is None:
        return None
    states = mems.states if isinstance(mems, Memory) else mems
    if len(states) != config.n_layers:
        raise ValueError(f"Transformer: mems has {len(states)} tensors; expected one per layer, {config.n_layers}")
    if not isinstance(mems, Memory):
        _check_rows(config, layout, mems)
        return Memory.of_rows(mems)
    if len(mems.lengths) != layout.sequences:
        raise ValueError(f"Transformer: mems is of {len(mems.lengths)} sequences; the batch has {layout.sequences}")
    expected = (sum(mems.lengths), config.d_model)
    for i, past in enumerate(states):
        if tuple(past.shape) != expected:
            raise ValueError(f"Transformer: mems.states[{i}] has shape {tuple(past.shape)}; expected {expected}")
    return mems


def _check_rows(config: TransformerConfig, layout: Packed, mems: Sequence[Tensor]) -> None:
    if not is_dense(layout):
        raise ValueError(
            "Transformer: mems of (length, batch, d_model) need a batch (batch, length) without padding; others take "
            "a Memory, as use_mems gives them"
        )
    for i, past in enumerate(mems):
        if past.dim() != 3 or past.shape[1:] != (layout.sequences, config.d_model) or len(past) != len(mems[0]):
            raise ValueError(
                f"Transformer: mems[{i}] has shape {tuple(past.shape)}; expected (length, {layout.sequences}, "
                f"{config.d_model}), all of one length"
            )


def is_dense(layout: Packed) -> bool:
    """Whether the caller's batch is (batch, length) without padding: Hugging Face's form of mems fits it."""
    return layout.indices is None and len(layout.shape) == 2 and layout.shape[0] == layout.sequences


def as_given(
    memory: Memory | None, layout: Packed, mems: Sequence[Tensor] | Memory | None
) -> list[Tensor] | Memory | None:
    """What a pass remembered, in Hugging Face's form where that fits the batch and the caller does not use ours."""
    if memory is None or isinstance(mems, Memory) or not is_dense(layout):
        return memory
    return memory.rows()
