"""Documents cut into sequences, for objectives that take running text.

A document of n tokens becomes ceil(n / length) sequences, each a contiguous part of it; together they are the whole
document. All are `length` tokens long but the first and the last, which share what is missing: how much falls
to the first is drawn for each document and epoch, so that the cuts move. Short documents stay whole.
"""

from __future__ import annotations

import numpy as np

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Latest
from llmengine.data.tokens import Tokens


class Cuts:
    """Where the sequences of an epoch lie in `tokens.ids`. Their number is the same in every epoch."""

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        self._tokens = tokens
        self._length = length
        self._seed = seed
        counts = -(-tokens.lengths // length)
        self._ends = np.cumsum(counts)
        self._missing = counts * length - tokens.lengths
        self._early = Latest(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        """(segments,) int64: by how much each segment's first sequence is short."""
        uniform = Draws(self._seed, epoch, Purpose.CUT).uniform(len(self._missing))
        several = np.diff(self._ends, prepend=0) > 1
        return np.where(several, (uniform * (self._missing + 1)).astype(np.int64), 0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def spans(self, epoch: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(begin, end) of sequences by index."""
        segments = self._ends.searchsorted(indices, "right")
        counts = np.diff(self._ends, prepend=0)
        within = indices - (self._ends - counts)[segments]
        begin = within * self._length - self._early(epoch)[segments]
        end = np.minimum(begin + self._length, self._tokens.lengths[segments])
        base = self._tokens.bounds[segments]
        return base + np.maximum(begin, 0), base + end

    def lengths(self, epoch: int) -> np.ndarray:
        begin, end = self.spans(epoch, np.arange(len(self)))
        return end - begin
