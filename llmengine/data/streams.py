"""Streams: texts that continue each other are read in successive steps by the same row (Dai et al. 2019).

An epoch's documents, in a random order, make one line of texts. It is cut into streams that are equally long, as many
as a step has room for, and step t reads the t-th text of each: what a row remembers of one step is what stands right
before its text of the next, until its stream comes to another document. A stream may begin within a document; that
text then has nothing behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmengine.data.draws import Draws


class StreamPart(NamedTuple):
    """A sequence of a step: the stream that it is part of, and how many of this stream's texts it continues, each
    right behind the other; 0: it begins anew."""

    stream: int
    behind: int


@dataclass(frozen=True)
class StreamPlan:
    """How an epoch's examples are read. Streams that are one text longer come first, so that a step has all streams or
    the first of them, and a stream is always in the same micro-batch."""

    order: np.ndarray
    """(examples,): all examples, stream after stream."""
    behind: np.ndarray
    """(examples,): of each in that order, as `StreamPart`."""
    begins: np.ndarray
    """(streams + 1,): where in the order each stream begins."""
    rows: int
    """Streams of a micro-batch."""
    steps: int

    def examples(self, step: int) -> list[np.ndarray]:
        """The examples of each micro-batch."""
        return [self.order[at] for at in self._places(step)]

    def parts(self, step: int) -> list[list[StreamPart]]:
        """The same as parts of streams."""
        streams = self.begins.searchsorted
        return [
            [StreamPart(int(streams(place, "right")) - 1, int(self.behind[place])) for place in at]
            for at in self._places(step)
        ]

    def _places(self, step: int) -> list[np.ndarray]:
        at = self.begins[:-1] + step
        at = at[at < self.begins[1:]]
        return np.split(at, range(self.rows, len(at), self.rows))


def plan_streams(follows: np.ndarray, rows: int, accumulation: int, draws: Draws | None) -> StreamPlan:
    """follows (examples,) bool: whether each continues the one before. rows: the most streams of a micro-batch.

    draws: the documents' order; None: as they come.
    """
    count = len(follows)
    starts = np.flatnonzero(~follows)
    sizes = np.diff(starts, append=count)
    chosen = np.arange(len(starts)) if draws is None else draws.order(len(starts))
    ends = np.cumsum(sizes[chosen])
    order = np.arange(count) + np.repeat(starts[chosen] - (ends - sizes[chosen]), sizes[chosen])
    steps = -(-count // (rows * accumulation))
    streams = -(-count // steps)
    begins = np.arange(streams + 1) * (count // streams) + np.minimum(np.arange(streams + 1), count % streams)
    anew = ~follows[order]
    anew[begins[:-1]] = True
    places = np.arange(count)
    behind = places - np.maximum.accumulate(np.where(anew, places, 0))
    return StreamPlan(order, behind, begins, -(-streams // accumulation), steps)
