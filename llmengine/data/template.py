"""What a tokenizer puts around a text or a pair of texts before a model reads them: [CLS] A [SEP] B [SEP], …

The template is read off what the tokenizer does with an example, so that cutting texts and putting them together needs
no tokenizer any more: a text is tokenised once, however many windows it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A special token, or the place of a text."""

    token: int | None
    """None: a text."""
    text: int
    """Which one, from 0."""
    type: int
    """Token type."""


class Inputs(NamedTuple):
    """ids and token types (tokens,); starts: where each text begins."""

    ids: list[int]
    types: list[int]
    starts: tuple[int, ...]


class Template:
    """`parts`, in their order; `added`: how many of them are special tokens."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.added = sum(part.token is not None for part in parts)

    @classmethod
    def of(cls, example: Any) -> Template:
        """From a tokenizers.Encoding of texts with special tokens; each text has a token at least."""
        parts: list[Part] = []
        for token, text, kind in zip(example.ids, example.sequence_ids, example.type_ids, strict=True):
            part = Part(token, -1, kind) if text is None else Part(None, text, kind)
            if part.token is not None or part not in parts:
                parts.append(part)
        return cls(parts)

    @property
    def sides(self) -> tuple[list[int], list[int]]:
        """The special tokens before a single text, and those behind it."""
        place = next(i for i, part in enumerate(self.parts) if part.token is None)
        before, behind = self.parts[:place], self.parts[place + 1 :]
        return [part.token for part in before if part.token is not None], [
            part.token for part in behind if part.token is not None
        ]

    def around(self, *texts: Sequence[int]) -> Inputs:
        """The texts' ids in their places."""
        ids: list[int] = []
        types: list[int] = []
        starts = [0] * len(texts)
        for token, text, kind in self.parts:
            tokens = texts[text] if token is None else [token]
            if token is None:
                starts[text] = len(ids)
            ids.extend(tokens)
            types.extend([kind] * len(tokens))
        return Inputs(ids, types, tuple(starts))


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens two texts of these lengths keep so that both fit: the longer one loses its last tokens until it
    is as long as the other, then both do (transformers' "longest_first")."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    longer = room - shorter
    # where both are cut and the room is odd, the one that was longer keeps one more
    return (longer, shorter) if first > second else (shorter, longer)


def spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Windows of `size` tokens over `length` of them, each beginning with the last `overlap` of the one before; the
    last may be shorter. None over no tokens."""
    if not 0 <= overlap < size:
        raise ValueError(f"spans: overlap must be 0 to {size - 1}, got {overlap}")
    starts = range(0, max(length - overlap, min(length, 1)), size - overlap)
    return [(start, min(start + size, length)) for start in starts]


def owned(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of each window of `spans` the tokens that stand nearer to its middle than to another's: all tokens, each once."""
    middles = [(following[0] + window[1] - 1) // 2 + 1 for window, following in pairwise(windows)]
    ends = [window[0] for window in windows[:1]] + middles + [window[1] for window in windows[-1:]]
    return list(pairwise(ends))
