"""Parts of arrays as one array, without copying them: shards of a corpus, or the documents that are not held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Pieces:
    """Ranges of one-dimensional arrays of one dtype, one after another. A slice is an array, copied where it must be.

    What it holds beside the arrays is 24 bytes a range.
    """

    def __init__(self, arrays: Sequence[np.ndarray], ranges: np.ndarray | None = None) -> None:
        """ranges (pieces, 3) int64: array, begin, end; None: all arrays, whole."""
        self._arrays = [np.asarray(array) for array in arrays]
        if ranges is None:
            ranges = np.array([(i, 0, len(array)) for i, array in enumerate(arrays)], np.int64).reshape(-1, 3)
        ranges = ranges[ranges[:, 2] > ranges[:, 1]]
        self._array, self._begin = ranges[:, 0], ranges[:, 1]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(ranges[:, 2] - ranges[:, 1])])
        self.dtype = self._arrays[0].dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        begin, end, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"Pieces: slices have no step, got {step}")
        if end <= begin:
            return np.zeros(0, self.dtype)
        first = int(self._starts.searchsorted(begin, "right")) - 1
        if end <= self._starts[first + 1]:
            at = int(self._begin[first]) + begin - int(self._starts[first])
            return self._arrays[self._array[first]][at : at + end - begin]
        parts = self._parts(np.array([[begin, end]]))
        return np.concatenate([self._arrays[array][a:b] for array, a, b in parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        return np.asarray(self[:], dtype)

    def take(self, ranges: np.ndarray) -> Pieces:
        """ranges (ranges, 2) int64, begin and end: these parts, in this order."""
        return Pieces(self._arrays, self._parts(ranges[ranges[:, 1] > ranges[:, 0]]))

    def _parts(self, ranges: np.ndarray) -> np.ndarray:
        """(parts, 3) int64, as the constructor takes them: what the ranges, none of them empty, have of each piece."""
        first = self._starts.searchsorted(ranges[:, 0], "right") - 1
        counts = self._starts.searchsorted(ranges[:, 1], "left") - first
        # one row for each piece that a range touches
        of = np.repeat(np.arange(len(ranges)), counts)
        piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[of]
        start, offset = self._starts[piece], self._begin[piece]
        begin = offset + np.maximum(ranges[of, 0] - start, 0)
        end = offset + np.minimum(ranges[of, 1], self._starts[piece + 1]) - start
        return np.stack([self._array[piece], begin, end], 1)
