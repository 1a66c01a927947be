"""Random numbers that depend on (seed, epoch, purpose, index) alone: on no worker, order or restart.

Philox 4x64 (Salmon et al. 2011) is keyed by (seed, epoch); purpose and index are the high words of its counter, so
that no two streams meet. Numbers are made from the raw 64-bit words, whose values NumPy promises to keep.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What numbers are drawn for: one stream each."""

    SPLIT = 0  # which documents are held out
    ORDER = 1  # the order of an epoch's examples
    CUT = 2  # where documents are cut into sequences
    PAIR = 3  # which segments make a pair
    TRUNCATE = 4  # which end of a pair's segment is cut off
    MASK = 5  # which tokens are masked, and by what
    NOISE = 6  # what is done to a text that is to be restored
    RANK = 7  # the order in which tokens are predicted


class Draws:
    """One stream of random numbers."""

    def __init__(self, seed: int, epoch: int, purpose: Purpose, index: int = 0) -> None:
        check_seed(seed)
        words = np.array([[seed, epoch, 0, 0], [0, 0, purpose, index]], np.uint64)
        self._bits = np.random.Philox(key=words[0, :2], counter=words[1])

    def uniform(self, n: int) -> np.ndarray:
        """(n,) float64 in [0, 1)."""
        return (self._bits.random_raw(n) >> np.uint64(11)) * 2.0**-53

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return int(self.uniform(1)[0] * bound)

    def order(self, n: int) -> np.ndarray:
        """(n,) int64: a permutation of 0 … n - 1."""
        return np.argsort(self._bits.random_raw(n), kind="stable")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
