"""Optimizer steps: which examples go into which packed batch, as a function of (seed, step) alone.

An epoch's examples are shuffled and, in that order, packed: a pack is a micro-batch of at most batch_tokens tokens, and
`accumulation` packs make a step. So that no epoch ends in a step of a few tokens, packs are filled to the lowest limit
that needs no more steps than batch_tokens does: steps of an epoch are about equally large, each example is in one.

Examples that continue each other (`Examples.follows`) are not packed but laid out in streams (data/streams.py).
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llmengine.data.draws import Draws, Purpose, check_seed
from llmengine.data.examples import Examples, Latest
from llmengine.data.streams import StreamPart, StreamPlan, plan_streams


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on.

    micro_batches: arguments of the model's call: input_ids, labels (tokens,) int64, cu_seqlens (sequences + 1,) int32,
        max_seqlen int, and where the objective has them token_type_ids (tokens,), next_sentence_label (sequences,),
        decoder_input_ids with its decoder_cu_seqlens and decoder_max_seqlen, target_positions in the packed tokens.
    items: what the step's losses are divided by, the model's num_items_in_batch: {"tokens": labelled tokens (for
        next-token prediction after the shift), "sequences": pairs, "read": all tokens} (only where pairs, or all
        tokens, are judged); each is 1 at least.
    epoch: which epoch the step belongs to, from 0. progress: epochs done when the step is done.
    streams: of examples that continue each other, which stream each sequence of each micro-batch is part of.
    """

    micro_batches: list[dict[str, Any]]
    items: dict[str, int]
    epoch: int
    progress: float
    streams: list[list[StreamPart]] | None = None


@dataclass(frozen=True)
class _Plan:
    """order (examples,): an epoch's examples as trained. ends: where in it each micro-batch ends. steps: how many."""

    order: np.ndarray
    ends: np.ndarray
    steps: int

    def examples(self, step: int) -> list[np.ndarray]:
        """The examples of each micro-batch of a step; micro-batches are spread evenly over the steps."""
        first, last = (len(self.ends) * i // self.steps for i in (step, step + 1))
        return [self.order[self.ends[i - 1] if i else 0 : self.ends[i]] for i in range(first, last)]

    def parts(self, _step: int) -> None:
        """No streams."""


class StepBatches(Dataset):
    """A map-style data set of optimizer steps: `batches[step]` for any step >= 0, over unlimited epochs.

    Resuming needs the step's number only. Sequences are never split and never padded.
    """

    def __init__(
        self, examples: Examples, *, batch_tokens: int, accumulation: int = 1, seed: int, shuffle: bool = True
    ) -> None:
        for name, value in (("batch_tokens", batch_tokens), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"StepBatches: {name} must be 1 or more, got {value}")
        check_seed(seed)
        self.examples = examples
        self.batch_tokens = batch_tokens
        self.accumulation = accumulation
        self.seed = seed
        self.shuffle = shuffle
        self._plan = Latest(self._make_plan)
        self._ends = [0]  # _ends[e]: the first step of epoch e, as far as epochs were planned

    @property
    def steps_per_epoch(self) -> int:
        """Steps of epoch 0. Others may differ by a few: a shuffled epoch fills its packs differently."""
        return self._plan(0).steps

    def steps_of(self, epochs: float) -> int:
        """Steps of so many epochs, the last one perhaps in part: 1 at least."""
        whole = int(epochs)
        while len(self._ends) <= whole:
            self._ends.append(self._ends[-1] + self._plan(len(self._ends) - 1).steps)
        steps = self._ends[whole]
        if epochs > whole:
            steps += math.ceil((epochs - whole) * self._plan(whole).steps)
        return steps

    def __getitem__(self, step: int) -> Step:
        if step < 0:
            raise IndexError(f"StepBatches: step must be 0 or more, got {step}")
        epoch, within = self._place(step)
        plan = self._plan(epoch)
        micro_batches = [
            self.examples.collate([self.examples[epoch, int(i)] for i in indices]) for indices in plan.examples(within)
        ]
        items = [self.examples.items(micro_batch) for micro_batch in micro_batches]
        # where nothing has a label the loss is 0, not 0 / 0
        total = {name: max(1, sum(each[name] for each in items)) for name in items[0]}
        return Step(micro_batches, total, epoch, epoch + (within + 1) / plan.steps, plan.parts(within))

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number within."""
        while step >= self._ends[-1]:
            self._ends.append(self._ends[-1] + self._plan(len(self._ends) - 1).steps)
        epoch = bisect_right(self._ends, step) - 1
        return epoch, step - self._ends[epoch]

    def _make_plan(self, epoch: int) -> _Plan | StreamPlan:
        lengths = self.examples.lengths(epoch)
        if len(lengths) == 0:
            raise ValueError("StepBatches: the corpus gives no example; give more text")
        if (longest := int(lengths.max())) > self.batch_tokens:
            raise ValueError(
                f"StepBatches: batch_tokens is {self.batch_tokens}, but a sequence has {longest} tokens; "
                f"give {longest} or more, or a smaller sequence_length"
            )
        n, draws = len(lengths), Draws(self.seed, epoch, Purpose.ORDER) if self.shuffle else None
        follows = self.examples.follows(epoch)
        if follows is not None:
            return plan_streams(follows, self.batch_tokens // longest, self.accumulation, draws)
        order = np.arange(n) if draws is None else draws.order(n)
        order = order.astype(np.int32 if n < 2**31 else np.int64)
        ends, steps = fill(lengths[order], self.batch_tokens, self.accumulation)
        return _Plan(order, ends, steps)


def fill(lengths: np.ndarray, limit: int, accumulation: int) -> tuple[np.ndarray, int]:
    """Packs sequences in order: (the sequence index at which each pack ends, number of steps).

    No pack holds more than `limit` tokens. The steps are as many as packs filled to the limit need, and the packs
    as even as that number of steps allows.
    """
    ends = np.cumsum(lengths)
    packs = _next_fit(ends, limit, len(lengths))
    steps = -(-len(packs) // accumulation)
    low, high = int(lengths.max()), limit  # the answer is in [low, high]
    while low < high:
        middle = (low + high) // 2
        tried = _next_fit(ends, middle, steps * accumulation)
        if tried:
            packs, high = tried, middle
        else:
            low = middle + 1
    return np.array(packs), steps


def _next_fit(ends: np.ndarray, limit: int, most: int) -> list[int]:
    """Where packs of up to `limit` tokens end; [] if there are more than `most` of them."""
    packs: list[int] = []
    done = 0
    while not packs or packs[-1] < len(ends):
        packs.append(int(ends.searchsorted(done + limit, "right")))
        done = int(ends[packs[-1] - 1])
        if len(packs) > most:
            return []
    return packs


def loader(batches: StepBatches, first: int, last: int, workers: int = 0) -> Iterator[Step]:
    """Steps first … last - 1 in order, made ahead by worker processes; the same for any number of them."""
    if not 0 <= first <= last:
        raise ValueError(f"loader: steps must have 0 <= first <= last, got first {first}, last {last}")
    if workers < 0:
        raise ValueError(f"loader: workers must be 0 or more, got {workers}")
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            # forked workers share the corpus; other ways of starting them would send each a copy
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            # seeds of workers come from here: the global generator is dropout's, which no loader may advance
            generator=torch.Generator(),
        )
    )
