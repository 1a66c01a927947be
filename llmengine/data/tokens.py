"""A tokenised corpus in a few flat arrays: what worker processes share without copying it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from llmengine.data.tokenizer import Tokenizer

BLOCK = 4096  # texts tokenised at a time


@dataclass(frozen=True)
class Tokens:
    """Token ids of all segments, one after another. Segments (whole documents, or sentences) have a token at least.

    ids (tokens,): the smallest unsigned dtype. bounds (segments + 1,) int64: segment s is ids[bounds[s]:bounds[s + 1]].
    documents (documents + 1,) int64: document d has the segments documents[d] to documents[d + 1].
    words (tokens,) bool: where a word begins; None unless asked for.
    """

    ids: np.ndarray
    bounds: np.ndarray
    documents: np.ndarray
    words: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """(segments,) int64."""
        return np.diff(self.bounds)


def tokenize(
    documents: Iterable[Iterable[str]], tokenizer: Tokenizer, *, longest: int | None = None,
    end: int | None = None, words: bool = False,
) -> Tokens:  # fmt: skip
    """Tokenises documents, each an iterable of texts. Texts and documents without a token are left out.

    longest: cut longer segments. end: a token after each segment. words: also tell where words begin.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size)
    ids, starts, lengths, segments = [], [], [], []
    texts = ((number, text) for number, document in enumerate(documents) for text in document)
    for number, encoded, begins in _encode(texts, tokenizer, words):
        if not encoded:
            continue
        array = np.array(encoded if end is None else [*encoded, end], dtype)
        step = longest or len(array)
        pieces = [min(step, len(array) - i) for i in range(0, len(array), step)]
        ids.append(array)
        starts.append(begins)
        lengths += pieces
        segments += [number] * len(pieces)
    per_document = np.unique(np.array(segments, np.int64), return_counts=True)[1]
    return Tokens(
        np.concatenate(ids) if ids else np.zeros(0, dtype),
        _offsets(np.array(lengths, np.int64)),
        _offsets(per_document),
        np.concatenate(starts) if words and starts else None,
    )


def _encode(
    texts: Iterator[tuple[int, str]], tokenizer: Tokenizer, words: bool
) -> Iterator[tuple[int, list[int], np.ndarray | None]]:
    """(document, ids, where words begin) of each text, block by block."""
    while block := list(islice(texts, BLOCK)):
        strings = [text for _, text in block]
        if words:
            for (number, _), (ids, begins) in zip(block, tokenizer.encode_words(strings), strict=True):
                yield number, ids, begins
        else:
            for (number, _), ids in zip(block, tokenizer.encode_many(strings), strict=True):
                yield number, ids, None


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
