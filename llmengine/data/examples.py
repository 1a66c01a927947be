"""What every objective offers to whoever makes batches of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
IGNORED = -100  # a label that asks for no loss


class Examples(ABC):
    """Training examples of unlimited epochs; each is a function of (seed, epoch, index) alone."""

    heads: tuple[str, ...]
    """Which heads these examples train: the model's `objectives`."""
    model_heads: tuple[str, ...] | None = None
    """The objectives of the model that a config describes, where others are trained with it; None: heads."""
    architecture: str = "encoder"
    """Of the models that these examples are for."""
    family: str = "gpt2"
    """Whose special tokens a byte-level BPE vocabulary trained for these examples has."""
    pairs: bool = False
    """Whether they are made of texts and their translations (data/pairs.py) instead of documents."""
    decoder_start: str | None = None
    """The role of the token that an encoder-decoder's target begins with."""

    def __len__(self) -> int:
        """Examples in epoch 0. Others may differ by a few where pairs are drawn anew: lengths(epoch) is the truth."""
        return len(self.lengths(0))

    @abstractmethod
    def lengths(self, epoch: int) -> np.ndarray:
        """(examples,) int64: the tokens of each example of an epoch, an encoder-decoder's of both sides together.

        Where chance decides how many they are, the most that they can be.
        """

    @abstractmethod
    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        """(epoch, index) -> int64 tensors: input_ids and labels (tokens,), and what else the model takes with them.

        decoder_input_ids (target tokens,), labels like them. target_positions (targets,): places in input_ids, labels
        like them. Numbers (0-d): one per sequence.
        """

    def follows(self, epoch: int) -> np.ndarray | None:
        """(examples,) bool: whether each example continues the one before it, and is to be read with its memory; None:
        examples stand alone."""
        return None

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Examples as the arguments of one call of the model: packed, unless an objective knows better."""
        return pack(examples)

    def items(self, micro_batch: dict[str, Any]) -> dict[str, int]:
        """How many labels of each kind a micro-batch has: what the model's num_items_in_batch counts."""
        labelled = micro_batch["labels"] != IGNORED
        if "clm" in self.heads:
            # the first token of a sequence is predicted by none
            labelled[micro_batch["cu_seqlens"][:-1].long()] = False
        items = {"tokens": int(labelled.sum())}
        if {"nsp", "sop"} & set(self.heads):
            items["sequences"] = len(micro_batch["cu_seqlens"]) - 1
        if "rtd" in self.heads:
            items["read"] = len(micro_batch["input_ids"])
        return items


def pack(examples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Examples one after another, as the model's arguments; numbers (0-d) become (sequences,)."""
    packed: dict[str, Any] = {
        name: (torch.cat if examples[0][name].dim() else torch.stack)([example[name] for example in examples])
        for name in examples[0]
    }
    for side in ("", "decoder_"):
        if f"{side}input_ids" in packed:
            lengths = torch.tensor([0] + [len(example[f"{side}input_ids"]) for example in examples])
            packed[f"{side}cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
            packed[f"{side}max_seqlen"] = int(lengths.max())
    if "target_positions" in packed:
        counts = torch.tensor([len(example["target_positions"]) for example in examples])
        packed["target_positions"] += packed["cu_seqlens"][:-1].long().repeat_interleave(counts)
    return packed


def tokens_of(batch: dict[str, Any]) -> int:
    """The tokens that a model reads of an example or a batch, those of both sides, padding included."""
    target = "labels" if "decoder_cu_seqlens" in batch else "decoder_input_ids"  # the same, shifted
    return sum(batch[name].numel() for name in ("input_ids", target) if name in batch)


def lengths_of(batch: Mapping[str, Any], side: str = "") -> list[int]:
    """The tokens of each sequence of a micro-batch; side "decoder_": of the targets."""
    if (bounds := batch.get(f"{side}cu_seqlens")) is not None:
        return bounds.diff().tolist()
    ids, mask = batch[f"{side}input_ids"], batch.get(f"{side}attention_mask")
    rows = ids.reshape(-1, ids.shape[-1])
    return [rows.shape[1]] * len(rows) if mask is None else mask.reshape(rows.shape).sum(1).tolist()


class Latest(Generic[T]):
    """Remembers a function's values at its last two arguments: where one epoch ends another begins."""

    def __init__(self, function: Callable[[int], T]) -> None:
        self._function = function
        self._values: dict[int, T] = {}

    def __call__(self, epoch: int) -> T:
        if epoch not in self._values:
            value = self._function(epoch)
            while len(self._values) > 1:
                self._values.pop(next(iter(self._values)))
            self._values[epoch] = value
        return self._values[epoch]
