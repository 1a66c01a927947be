"""A corpus of texts and their translations, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmengine.data.corpus import check_fraction
from llmengine.data.draws import Draws, Purpose
from llmengine.data.rows import KINDS, iterate_rows
from llmengine.data.textfiles import without_compression


@dataclass(frozen=True)
class Pairs:
    """(source, target) texts."""

    rows: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.rows)

    @property
    def texts(self) -> list[str]:
        """Of both sides, pair by pair."""
        return [text for pair in self.rows for text in pair]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()

    def split(self, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
        """(train, held_out), the latter about `fraction` of the pairs, chosen by seed alone."""
        check_fraction("Pairs.split", fraction)
        count = round(fraction * len(self))
        if fraction and not 0 < count < len(self):
            raise ValueError(
                f"corpus: {len(self)} pairs are too few to hold out {fraction:.3g} of them; give more, or hold out "
                "nothing (0)"
            )
        chosen = set(Draws(seed, 0, Purpose.SPLIT).order(len(self))[:count].tolist())
        parts = ([pair for i, pair in enumerate(self) if (i in chosen) == held] for held in (False, True))
        train, held_out = (Pairs(tuple(part)) for part in parts)
        return train, held_out


def read_pairs(source: str | Path | Sequence[str | Path]) -> Pairs:
    """Pairs from files of rows with the columns source and target, or from two text files, line by line.

    Raises FileNotFoundError, or ValueError naming file and line.
    """
    paths = [Path(path) for path in ([source] if isinstance(source, str | Path) else source)]
    suffixes = {suffix for name, kind in KINDS.items() if name != "text" for suffix in kind.suffixes}
    plain = not any(Path(without_compression(path)).suffix.lower() in suffixes for path in paths)
    columns = {name: name for name in ("source", "target")}
    rows = []
    for row in iterate_rows(paths, kind="parallel" if plain else None, columns=columns):
        for name in columns:
            if not isinstance(row[name], str):
                raise ValueError(f"corpus: {row.place}: {name} is {row[name]!r}; expected a text")
        rows.append((row["source"], row["target"]))
    if not rows:
        raise ValueError(f"corpus: {', '.join(map(str, paths))}: no pair; give texts and their translations")
    return Pairs(tuple(rows))
