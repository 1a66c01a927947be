"""What is wrong with rows of data: raised, or the row skipped, counted and told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SHOWN = 3  # skipped rows that are told one by one
Row = dict[str, Any]
Placed = tuple[str, Row]


class Faults:
    """Called with a place and what is wrong there: raises, or, where bad is "skip", remembers."""

    def __init__(self, bad: str, notice: Callable[[str], object]) -> None:
        if bad not in ("raise", "skip"):
            raise ValueError(f'data: bad must be "raise" or "skip", got {bad!r}')
        self._skips = bad == "skip"
        self.notice = notice
        self._count = 0
        self._first: list[str] = []

    def __call__(self, place: str, what: str) -> None:
        if not self._skips:
            raise ValueError(f"data: {place} {what}")
        self._count += 1
        if self._count <= SHOWN:
            self._first.append(f"{place} {what}")

    def tell(self) -> None:
        """A notice of what was skipped so far."""
        if self._count:
            more = [f"and {self._count - SHOWN:,} more"] if self._count > SHOWN else []
            rows = "row is" if self._count == 1 else "rows are"
            self.notice("\n  ".join([f"data: {self._count:,} bad {rows} skipped:", *self._first, *more]))
