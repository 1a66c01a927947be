"""A tokenised corpus in a few flat arrays: what worker processes share without copying it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from llmengine.data.tokenizer import Tokenizer

BLOCK = 2**22  # characters tokenised at a time


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


def tokenize(
    documents: Iterable[Iterable[str]], tokenizer: Tokenizer, *, longest: int | None = None,
    end: int | None = None, words: bool = False,
) -> Tokens:  # fmt: skip
    """Tokenises documents, each an iterable of texts. Texts and documents without a token are left out.

    longest: cut longer segments. end: a token after each segment. words: also tell where words begin.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size)
    tail = [] if end is None else [end]
    ids, starts = [np.zeros(0, dtype)], [np.zeros(0, bool)]
    lengths: list[int] = []
    owners: list[int] = []  # each segment's document
    for block in _blocks((number, text) for number, document in enumerate(documents) for text in document):
        texts = [text for _, text in block]
        if words:
            both = tokenizer.encode_words(texts)
            encoded = [each for each, _ in both]
            starts += [np.append(begins, [True] * len(tail)) if len(begins) else begins for _, begins in both]
        else:
            encoded = tokenizer.encode_many(texts)
        encoded = [each + tail if each else each for each in encoded]
        ids.append(np.fromiter(chain.from_iterable(encoded), dtype))
        for (number, _), each in zip(block, encoded, strict=True):
            step = longest or max(1, len(each))
            pieces = [min(step, len(each) - i) for i in range(0, len(each), step)]
            lengths += pieces
            owners += [number] * len(pieces)
    per_document = np.unique(np.array(owners, np.int64), return_counts=True)[1]
    return Tokens(
        np.concatenate(ids),
        _offsets(np.array(lengths, np.int64)),
        _offsets(per_document),
        np.concatenate(starts) if words else None,
    )


def _blocks(texts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Texts in lists of about BLOCK characters."""
    block, size = [], 0
    for number, text in texts:
        block.append((number, text))
        size += len(text)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
