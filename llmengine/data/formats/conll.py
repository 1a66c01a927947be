"""CoNLL files: a word and its tags a line, a blank line after each sentence; and the schemes of tags that mark spans.

BIO (IOB2): B-X begins a span of X, I-X goes on with it, O is outside. IOB1 (Ramshaw & Marcus 1995): B-X only where a
span follows another of its kind. BIOES (or BILOU, BMES): a span's last word is E-X (L-X), a span of one word S-X (U-X).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from llmengine.data.formats.faults import Faults, Placed
from llmengine.data.textfiles import decode, numbered_lines, opened

SCHEMES = ("bio", "iob1", "bioes", "none")
OUTSIDE, DOCUMENT = "O", "-DOCSTART-"
TAG = re.compile(r"([BIESLUM])-(.+)", re.DOTALL)
BLANK = re.compile(r"[ \t]+")
ROLES = {"S": "S", "U": "S", "E": "E", "L": "E", "M": "I", "B": "B", "I": "I"}  # of BIOES under its other names


def read_conll(
    path: Path, faults: Faults, *, words: int = 0, tags: int = -1, scheme: str | None = None,
    comments: str | None = None,
) -> Iterator[Placed]:  # fmt: skip
    """{words, tags} for each sentence; tags of spans become BIO. -DOCSTART- lines are left out.

    words, tags: columns from 0, or from the end (-1: the last one); a file of one column has no tags. Columns are
    separated by tabs where the first line has one, else by blanks. scheme: of the file's tags: "bio", "iob1", "bioes",
    or "none" (tags of words, which stay as they are); None: found from all of the file's tags, and told where it is
    another than BIO. comments: lines that begin with this are left out. Tags that break their scheme, a line that has
    more or fewer columns than the first one or an empty word or tag are faults of their sentence.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"data: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if scheme is None:
        silent = Faults("skip", lambda _: None)
        scheme = find_scheme(found for _, _, found, _ in _sentences(path, silent, words, tags, comments) if found)
        if scheme in ("iob1", "bioes"):
            faults.notice(f"data: {path}: the tags are {scheme.upper()}; they are read as BIO")
    for place, text, found, numbers in _sentences(path, faults, words, tags, comments):
        if found is None:
            yield place, {"words": text}
            continue
        try:
            bio = found if scheme == "none" else to_bio(found, scheme)
        except TagError as error:
            faults(f"{path}, line {numbers[error.at]}:", str(error))
            continue
        yield place, {"words": text, "tags": bio}


Sentence = tuple[str, list[str], "list[str] | None", list[int]]  # place, words, tags, numbers of the lines


def _sentences(path: Path, faults: Faults, words: int, tags: int, comments: str | None) -> Iterator[Sentence]:
    columns, separator = 0, ""
    rows: list[list[str]] = []
    numbers: list[int] = []
    wrong: tuple[str, str] | None = None  # the first fault of a sentence

    def end() -> Iterator[Sentence]:
        if wrong:
            faults(*wrong)
        elif rows:
            found = [row[tags] for row in rows] if columns > 1 else None
            yield f"{path}, line {numbers[0]}", [row[words] for row in rows], found, list(numbers)

    with opened(path, "data") as file:
        for number, offset, line in numbered_lines(file):
            place = f"{path}, line {number}"
            try:
                text = decode(line, offset).rstrip("\r\n")
            except ValueError as error:
                wrong = wrong or (place, str(error))
                continue
            if not text.strip() or text.startswith(DOCUMENT):
                yield from end()
                rows, numbers, wrong = [], [], None
                continue
            if comments and text.startswith(comments):
                continue
            if not columns:
                separator = "\t" if "\t" in text else ""
            row = text.split("\t") if separator else BLANK.split(text.strip(" \t"))
            if not columns:
                columns = len(row)
                _check_columns(place, columns, words=words, tags=tags)
            rows.append(row)
            numbers.append(number)
            if len(row) != columns:
                wrong = wrong or (place, f"has {len(row)} columns, but the first line has {columns}")
            elif not row[words].strip() or not row[tags].strip():
                wrong = wrong or (place, "has an empty word or tag")
        yield from end()


def _check_columns(place: str, columns: int, **chosen: int) -> None:
    for name, column in chosen.items():
        if not -columns <= column < columns:
            raise ValueError(f"data: {place} has {columns} columns; {name} cannot be column {column}")


# ---- schemes ---------------------------------------------------------------------------------------------------------


class TagError(ValueError):
    """A tag that breaks its scheme. at: the number of its word."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(what)
        self.at = at


def find_scheme(sentences: Iterator[Sequence[str]]) -> str:
    """The scheme that explains all tags: "bio", "iob1", "bioes"; "none" where they do not mark spans.

    They do where one begins with B- or I-, or where all but O begin as BIOES has it. BIO and IOB1 differ in how a span
    begins that does not follow one of its kind: where both ways occur it is "bio", which then has errors.
    """
    prefixes, begins, others = set(), set(), False
    for tags in sentences:
        before = OUTSIDE
        for tag in tags:
            match = TAG.fullmatch(tag)
            if match:
                prefixes.add(match[1])
                if before[2:] != match[2]:
                    begins.add(match[1])
            others = others or not (match or tag == OUTSIDE)
            before = tag if match else OUTSIDE
    if not prefixes & {"B", "I"} and (others or not prefixes):
        return "none"
    if prefixes - {"B", "I"}:
        return "bioes"
    return "bio" if "B" in begins else "iob1"


def to_bio(tags: Sequence[str], scheme: str) -> list[str]:
    """The BIO tags of a sentence whose tags are of a scheme ("bio": they are checked). Raises TagError."""
    parts = [_parts(i, tag, scheme) for i, tag in enumerate(tags)]
    bio = []
    for i, ((before, kind_before), (role, kind)) in enumerate(pairwise([(OUTSIDE, ""), *parts])):
        same = kind == kind_before
        if scheme == "iob1" and role == "I" and not same:
            role = "B"
        elif scheme == "bio" and role == "I" and not same:
            raise TagError(i, f'{_beside(tags, i)}: {kind} begins with B-, or, where not, give scheme="iob1"')
        elif scheme == "bioes":
            inside = before in ("B", "I")
            if inside != (role in ("I", "E")) or (inside and not same):
                raise TagError(i, _beside(tags, i))
            role = {"S": "B", "E": "I"}.get(role, role)
        bio.append(f"{role}-{kind}" if kind else OUTSIDE)
    if scheme == "bioes" and parts and parts[-1][0] in ("B", "I"):
        raise TagError(len(tags) - 1, f"{tags[-1]} cannot end a sentence")
    return bio


def _beside(tags: Sequence[str], i: int) -> str:
    return f"{tags[i]} cannot {f'follow {tags[i - 1]}' if i else 'begin a sentence'}"


def _parts(i: int, tag: str, scheme: str) -> tuple[str, str]:
    """A tag's role (B, I, E, S, O) and the kind of its span."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    match = TAG.fullmatch(tag)
    if match is None or (scheme != "bioes" and match[1] not in "BI"):
        raise TagError(i, f"{tag} is no tag of {scheme.upper()}")
    return ROLES[match[1]], match[2]
