"""What a run tells those who watch it: progress lines, plots, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmengine.training.metrics import Record

if TYPE_CHECKING:
    from llmengine.training.loop import Result
    from llmengine.training.run import Run


class Observer:
    """Override what you want to hear. Drawing random numbers does no harm: each step seeds the generators anew."""

    def started(self, run: Run, step: int, records: Sequence[Record]) -> None:
        """Training goes on at `step` (0: from the start); records: the lines of metrics.jsonl before it."""

    def recorded(self, run: Run, record: Record) -> None:
        """A line of metrics.jsonl: kind "train" or "evaluation"."""

    def noticed(self, sentence: str) -> None:
        """Something that a person should know."""

    def finished(self, run: Run, result: Result) -> None:
        """After the last step, or after the one at which the run was interrupted; everything is saved."""

    def closed(self) -> None:
        """Training is over, also by an error."""


class Observers(Observer):
    """Several as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def started(self, run: Run, step: int, records: Sequence[Record]) -> None:
        for observer in self._observers:
            observer.started(run, step, records)

    def recorded(self, run: Run, record: Record) -> None:
        for observer in self._observers:
            observer.recorded(run, record)

    def noticed(self, sentence: str) -> None:
        for observer in self._observers:
            observer.noticed(sentence)

    def finished(self, run: Run, result: Result) -> None:
        for observer in self._observers:
            observer.finished(run, result)

    def closed(self) -> None:
        for observer in self._observers:
            observer.closed()
