"""Text and tables in the Markdown files that a run leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """Without the control characters that an untrained byte-level model writes."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def cell(text: str) -> str:
    """Text for a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def excerpt(text: str, most: int) -> str:
    """Text on one line, as a reader is to see it: no mark-up of its own, and what is beyond `most` left out."""
    line = " ".join(printable(text).split())
    line = line if len(line) <= most else line[: most - 1].rstrip() + "…"
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|$~" else c for c in line)


def number(value: float) -> str:
    """Counts as they are, other numbers with four digits after the point; what is unknown (NaN) is a dash."""
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
