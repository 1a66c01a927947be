"""Documents cut into sequences, for objectives that take running text.

`Cuts`: a document of n tokens becomes ceil(n / length) sequences, each a contiguous part of it; together they are the
whole document. All are `length` tokens long but the first and the last, which share what is missing: how much falls to
the first is drawn for each document and epoch, so that the cuts move. Short documents stay whole.

`Windows`: sequences overlap, each begins `reuse` tokens behind the one before, the same in every epoch. They are for
memory: the states of a sequence's first `reuse` tokens stand right before the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Latest
from llmengine.data.tokens import Tokens, offsets


class Spans(ABC):
    """Where the sequences of an epoch lie in `tokens.ids`. Their number is the same in every epoch."""

    def __init__(self, tokens: Tokens, length: int, counts: np.ndarray) -> None:
        """length: of the longest sequence. counts (documents,): how many sequences each document becomes."""
        self._bounds, self._tail, self._length = tokens.bounds, tokens.tail, length
        # _first[d]: the number of a document's first sequence; the last entry is the number of all sequences
        self._first = offsets(counts)

    def __len__(self) -> int:
        return int(self._first[-1])

    def spans(self, epoch: int, indices: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences begin, …, end in `tokens.ids`, by index."""
        document = self._first.searchsorted(indices, "right") - 1
        begin = self._bounds[document] + self._begin(epoch, document, indices - self._first[document])
        end = np.minimum(begin + self._length, self._bounds[document + 1] - self._tail)
        return np.maximum(begin, self._bounds[document]), end

    @abstractmethod
    def _begin(self, epoch: int, document: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Where in its document a sequence of full length would begin, by its number there."""

    def span(self, epoch: int, index: int) -> slice:
        """One sequence's place in `tokens.ids`."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is not in [0, {len(self)})")
        begin, end = self.spans(epoch, index)
        return slice(int(begin), int(end))

    def lengths(self, epoch: int) -> np.ndarray:
        """(sequences,) int64."""
        begin, end = self.spans(epoch, np.arange(len(self)))
        return end - begin


class Windows(Spans):
    """All are `length` tokens long but a document's last one, which ends where it does."""

    def __init__(self, tokens: Tokens, length: int, reuse: int) -> None:
        sizes = np.diff(tokens.bounds) - tokens.tail
        super().__init__(tokens, length, 1 + -(-np.maximum(sizes - length, 0) // reuse))
        self._reuse = reuse

    def _begin(self, epoch: int, document: np.ndarray, number: np.ndarray) -> np.ndarray:
        return number * self._reuse

    def follows(self) -> np.ndarray:
        """(sequences,) bool: all but the first ones of documents."""
        follows = np.ones(len(self), bool)
        follows[self._first[:-1]] = False
        return follows


class Cuts(Spans):
    """shortest: no sequence of a document that is cut is shorter (2 at most, where length is 3 or more)."""

    def __init__(self, tokens: Tokens, length: int, seed: int, shortest: int = 1) -> None:
        sizes = np.diff(tokens.bounds) - tokens.tail
        super().__init__(tokens, length, -(-sizes // length))
        self._shortest = shortest
        self._seed = seed
        self._missing = np.diff(self._first) * length - sizes
        self._early = Latest(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        """(documents,) int64: by how much each document's first sequence is short."""
        uniform = Draws(self._seed, epoch, Purpose.CUT).uniform(len(self._missing))
        low = np.maximum(0, self._missing - self._length + self._shortest)
        high = np.minimum(self._missing, self._length - self._shortest)
        several = np.diff(self._first) > 1
        return np.where(several, low + (uniform * (high - low + 1)).astype(np.int64), 0)

    def _begin(self, epoch: int, document: np.ndarray, number: np.ndarray) -> np.ndarray:
        return number * self._length - self._early(epoch)[document]
