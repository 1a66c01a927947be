"""Rows of labelled data, from files of many formats: what fine-tuning is made of."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmengine.data.formats.conll import read_conll
from llmengine.data.formats.dataset import is_dataset, read_dataset
from llmengine.data.formats.faults import Faults, Placed
from llmengine.data.formats.lines import read_jsonl, read_parallel, read_text
from llmengine.data.formats.objects import read_json, read_squad
from llmengine.data.formats.tables import read_csv, read_tsv
from llmengine.data.textfiles import OPENERS, without_compression


@dataclass(frozen=True)
class Kind:
    """A format. suffixes: of files that are of this kind where none is given. numbered: columns have numbers."""

    read: Callable[..., Iterator[Placed]]
    suffixes: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def options(self) -> list[str]:
        parameters = inspect.signature(self.read).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.columns]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that have numbers."""
        return ("words", "tags") if self.numbered else ()


KINDS = {
    "jsonl": Kind(read_jsonl, (".jsonl", ".ndjson")),
    "json": Kind(read_json, (".json",)),
    "csv": Kind(read_csv, (".csv",)),
    "tsv": Kind(read_tsv, (".tsv",)),
    "conll": Kind(read_conll, (".conll", ".bio", ".iob"), numbered=True),
    "squad": Kind(read_squad),
    "text": Kind(read_text, (".txt",)),
    "parallel": Kind(read_parallel),
}
Source = str | os.PathLike | Sequence[str | os.PathLike] | Any


class PlacedRow(dict[str, Any]):
    """A row that knows where it was read ("reviews.csv, line 7"), for what is found wrong with it later."""

    __slots__ = ("place",)

    def __init__(self, place: str, columns: Mapping[str, Any]) -> None:
        super().__init__(columns)
        self.place = place


def read_rows(source: Source, **options: Any) -> list[PlacedRow]:
    """All rows of `iterate_rows`. Raises ValueError where there is none."""
    rows = list(iterate_rows(source, **options))
    if not rows:
        raise ValueError(f"data: {_described(source)}: no row; give data with rows")
    return rows


def iterate_rows(
    source: Source, *, kind: str | None = None, columns: Mapping[str, str | int] | None = None, bad: str = "raise",
    notice: Callable[[str], object] = warnings.warn, **options: Any,
) -> Iterator[PlacedRow]:  # fmt: skip
    """The rows of a data set, one by one: dicts from names of columns to values, which know their `place`.

    source: a file or several, each of which may be compressed (.gz, .xz); or a Hugging Face `datasets.Dataset`.
    kind: the format: "jsonl" (an object a line), "json" (a list of objects, or SQuAD's layout), "csv" and "tsv" (with a
        header; options quoting, header, and of csv delimiter), "conll" (words and tags; options scheme, comments),
        "squad", "text" (lines: {text}), "parallel" (two files, line by line: {source, target}). None: by the file's
        suffix, as KINDS says. The readers in llmengine/data/formats/ say what each takes and gives.
    columns: {name that a row is to have: name in the file}, as {"text": "sentence", "label": "stars"}; other columns
        keep their names, unless one that is given takes theirs. Of conll: {"words": 0, "tags": -1}, numbers.
    bad: "raise" a ValueError that names file and line of a malformed row, or "skip" it.
    notice: called with a sentence about what was skipped, when all rows are read, and what else should be known.

    What is wrong with a whole file (it is damaged, its header has a name twice, …) always raises ValueError.
    Arguments are checked at once; files are read as rows are asked for.
    """
    faults = Faults(bad, notice)
    named = {name: str(theirs) for name, theirs in (columns or {}).items()}
    if is_dataset(source):
        if kind is not None or options:
            raise ValueError("data: kind and options are for files; a data set has neither")
        return _rows(read_dataset(source, faults), named, faults)
    paths = [Path(path).expanduser() for path in ([source] if isinstance(source, str | os.PathLike) else source)]
    kinds = _kinds(paths, kind, options)
    if any(each.numbered for each in kinds):
        options |= _numbers(named, kinds)
        named = {}
    groups = [paths] if kind == "parallel" else [[path] for path in paths]
    files = zip(groups, kinds, strict=False)
    placed = (pair for group, each in files for pair in each.read(*group, faults=faults, **options))
    return _rows(placed, named, faults)


def check_format(given: Mapping[str, Any]) -> None:
    """That there is such a kind (none: a file's name will tell), and that it, or any, has these options."""
    options = {name: value for name, value in given.items() if name != "kind"}
    kind = given.get("kind")
    if kind is not None:
        _check_options("format", kind, options)
        return
    allowed = sorted({name for each in KINDS.values() for name in each.options})
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"format: {', '.join(unknown)} is not one of kind, {', '.join(allowed)}")


def _check_options(where: str, kind: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{where}: kind {kind!r} is not one of {', '.join(KINDS)}")
    allowed = KINDS[kind].options
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(
            f"{where}: kind {kind!r} has no option {', '.join(unknown)}; options: {', '.join(allowed) or 'none'}"
        )


def _kinds(paths: Sequence[Path], name: str | None, options: Mapping[str, Any]) -> list[Kind]:
    """The kind of each file; that the files are there, and that the options are theirs."""
    if not paths:
        raise ValueError("data: no file; give one or several")
    for path in paths:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"data: {path} {problem}; give files")
    if name == "parallel" and len(paths) != 2:
        raise ValueError(f'data: "parallel" takes two files, source and target; got {len(paths)}')
    names = [name or _kind(path) for path in paths]
    for each in names:
        _check_options("data", each, options)
    return [KINDS[each] for each in names]


def _described(source: Source) -> str:
    if is_dataset(source):
        return "the data set"
    return str(source) if isinstance(source, str | os.PathLike) else ", ".join(map(str, source))


def _kind(path: Path) -> str:
    """By the file's name."""
    suffix = Path(without_compression(path)).suffix.lower()
    for name, kind in KINDS.items():
        if suffix in kind.suffixes:
            return name
    known = " ".join(f"*{suffix}" for kind in KINDS.values() for suffix in kind.suffixes)
    raise ValueError(
        f"data: {path}: its name does not tell its kind ({known}, also with {' or '.join(OPENERS)} behind); "
        f"give kind: {', '.join(KINDS)}"
    )


def _numbers(columns: Mapping[str, str], kinds: Sequence[Kind]) -> dict[str, int]:
    """Columns of files that give them numbers."""
    if not all(kind.numbered for kind in kinds):
        raise ValueError('data: files of kind "conll" have no names of columns: read them without the others')
    if unknown := sorted(set(columns) - set(kinds[0].columns)):
        raise ValueError(f"data: {', '.join(unknown)} is no column of a conll file; {', '.join(kinds[0].columns)}")
    try:
        return {name: int(number) for name, number in columns.items()}
    except ValueError:
        raise ValueError(
            f"data: columns of a conll file are numbers from 0, or from the end (-1: the last); got {dict(columns)}"
        ) from None


def _rows(placed: Iterator[Placed], columns: Mapping[str, str], faults: Faults) -> Iterator[PlacedRow]:
    """Rows with their columns renamed."""
    taken = {*columns, *columns.values()}
    for place, row in placed:
        if missing := [name for name in columns.values() if name not in row]:
            faults(place, f"has no column {', '.join(map(repr, missing))}; its columns: {', '.join(map(repr, row))}")
            continue
        others = {name: value for name, value in row.items() if name not in taken}
        yield PlacedRow(place, {name: row[theirs] for name, theirs in columns.items()} | others)
    faults.tell()
