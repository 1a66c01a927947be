"""The search behind `llmengine tune`: from the tile of a slot to its fastest neighbour, and so on.

    tile = what an earlier run found, or built-in
    repeat: measure the neighbours of the tile (one field a step up or down) beside it, by turns
            the fastest becomes the tile, if it is faster by MARGIN; else stop

A neighbour takes part if every call of the problem runs with it and agrees with the built-in tile's results; one that
does not is told. At the end built-in, the earlier run's and tile are measured once more, side by side: what is kept has
been faster twice, and what was known is lost to a faster one alone, however short the time. What a call takes is up to
`measure`, so that the search runs without a GPU.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import TritonError

from llmengine.backends.triton import tuned

Call = Callable[[], Sequence[Tensor]]
Measure = Callable[[Mapping[Any, Call]], Mapping[Any, float]]  # calls by tile -> milliseconds by tile

MARGIN = 0.02
ROUNDS = 15
LEAST = 2**-5  # of the mean norm of rows: what a row's own is raised by where it is told whether two are the same


@dataclass(frozen=True)
class Problem:
    """A slot of the tables, and what makes the calls that run with its tile: the first is measured, and the others must
    run, too. They hold their operands, and so are not made before they are asked for."""

    slot: str
    built_in: Any
    make: Callable[[], Iterable[Call]]

    @functools.cached_property
    def calls(self) -> tuple[Call, ...]:
        return tuple(self.make())

    def under(self, tile: Any) -> Call:
        def call() -> Sequence[Tensor]:
            with tuned.trial(self.slot, tile):
                return self.calls[0]()

        return call

    def results(self, tile: Any) -> list[list[Tensor]]:
        """Of all calls."""
        with tuned.trial(self.slot, tile):
            return [list(call()) for call in self.calls]


@dataclass(frozen=True)
class Found:
    slot: str
    built_in: Any
    tile: Any
    built_in_ms: float
    ms: float

    @property
    def improved(self) -> bool:
        return self.tile != self.built_in

    def record(self) -> dict[str, Any]:
        beside = {"built_in": list(self.built_in), "ms": self.ms, "built_in_ms": self.built_in_ms}
        return self.tile._asdict() | beside


def search(
    problem: Problem,
    measure: Measure,
    expired: Callable[[], bool] = lambda: False,
    known: Any = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Found:
    """The fastest tile that was found before the time expired, beginning with the one that is known, if it is right.
    `tell` is given a line for each that is not. Raises what the built-in tile does."""
    expected = problem.results(problem.built_in)

    def right(tile: Any) -> bool:
        wrong = fault(problem, tile, expected)
        if wrong:
            tell(f"{problem.slot}: not {text_of(tile)}: {wrong}")
        return not wrong

    begin = known if known is not None and right(known) else problem.built_in
    best, tried = begin, {problem.built_in, begin}
    while not expired():
        around = [tile for tile in neighbours(best) if tile not in tried]
        tried.update(around)
        times = measure({tile: problem.under(tile) for tile in (best, *filter(right, around))})
        fastest = min(times, key=times.__getitem__)
        if times[fastest] > times[best] * (1 - MARGIN):
            break
        best = fastest
    times = measure({tile: problem.under(tile) for tile in dict.fromkeys((problem.built_in, begin, best))})
    if best != begin and times[best] > times[begin] * (1 - MARGIN):
        best = begin
    # what an earlier run found was faster by a margin then; what this one found must be
    margin = 0 if best == known else MARGIN
    if times[best] >= times[problem.built_in] * (1 - margin):
        best = problem.built_in
    return Found(problem.slot, problem.built_in, best, times[problem.built_in], times[best])


def neighbours(tile: Any) -> Iterator[Any]:
    for field in tile._fields:
        choices = tuned.allowed(field)
        at = choices.index(getattr(tile, field))
        for step in (at - 1, at + 1):
            if 0 <= step < len(choices):
                yield tile._replace(**{field: choices[step]})


# Too much shared memory, or of the device's; no code for a tile, or a compiler that fails of it; a launch that is
# refused. What has broken the device is a RuntimeError, too, and ends everything: torch.AcceleratorError.
FAILURES = (TritonError, RuntimeError)


def fault(problem: Problem, tile: Any, expected: list[list[Tensor]]) -> str | None:
    """Why a tile is none to be used: a call fails with it, or gives what it does not give with the built-in one."""
    try:
        found = problem.results(tile)
    except torch.AcceleratorError:
        raise
    except FAILURES as error:
        return reason_of(error)
    pairs = (pair for got, wanted in zip(found, expected, strict=True) for pair in zip(got, wanted, strict=True))
    return None if all(same(a, b) for a, b in pairs) else "other results than with the built-in tile"


def reason_of(error: Exception) -> str:
    """A line of it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def text_of(tile: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in tile._asdict().items())


def same(a: Tensor, b: Tensor) -> bool:
    """Up to the order of sums: tiles add in theirs. Row by row, by norms, for what a late row of causal attention holds
    is small beside the first one's; of rows that are all but 0, rounding is measured by what the others hold."""
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return False
    tolerance = 2**-14 if b.dtype == torch.float32 else 2**-5
    error, norm = (torch.atleast_1d(x.where(finite, 0).float()).norm(dim=-1) for x in (a - b, b))
    return not b.numel() or bool((error <= tolerance * (norm + LEAST * norm.mean())).all())


def medians(calls: Mapping[Any, Call]) -> dict[Any, float]:
    """Milliseconds on the GPU, of calls by turns, each with an empty cache."""
    device = torch.device("cuda")
    cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    events: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for call in calls.values():  # compiles
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(begin.elapsed_time(end) for begin, end in pairs) for name, pairs in events.items()}
