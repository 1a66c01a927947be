"""A tokenised corpus in a few flat arrays: what worker processes share without copying it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from llmengine.data.pieces import Pieces
from llmengine.data.tokenizer import Tokenizer

BLOCK = 2**22  # characters tokenised at a time


@dataclass(frozen=True)
class Tokens:
    """Token ids of all segments, one after another. Segments (whole documents, or sentences) have a token at least.

    ids (tokens,): the smallest unsigned dtype. bounds (segments + 1,) int64: segment s is ids[bounds[s]:bounds[s + 1]].
    documents (documents + 1,) int64: document d has the segments documents[d] to documents[d + 1].
    words (tokens,) bool: where a word begins; None unless asked for.
    tail: so many tokens at each segment's end were stored for others and are none of its text: 0, or 1 (an end token).

    ids and words may lie in memory-mapped files: they are there to be sliced.
    """

    ids: np.ndarray | Pieces
    bounds: np.ndarray
    documents: np.ndarray
    words: np.ndarray | Pieces | None = None
    tail: int = 0


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
            after = np.ones(len(tail), bool)
            starts += [np.concatenate([begins, after]) if len(begins) else begins for _, begins in both]
        else:
            encoded = tokenizer.encode_many(texts)
        encoded = [each + tail if each else each for each in encoded]
        ids.append(np.fromiter(chain.from_iterable(encoded), dtype))
        lengths += [len(each) for each in encoded if each]
        owners += [number for (number, _), each in zip(block, encoded, strict=True) if each]
    per_document = np.unique(np.array(owners, np.int64), return_counts=True)[1]
    tokens = Tokens(
        np.concatenate(ids),
        offsets(np.array(lengths, np.int64)),
        offsets(per_document),
        np.concatenate(starts) if words else None,
    )
    return tokens if longest is None else shortened(tokens, longest)


def shortened(tokens: Tokens, longest: int) -> Tokens:
    """The same tokens, segments of more than `longest` cut into several."""
    sizes = np.diff(tokens.bounds)
    parts = -(-sizes // longest)
    # the parts of a segment begin 0, longest, 2 longest, … tokens after it
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    bounds = np.append(np.repeat(tokens.bounds[:-1], parts) + number * longest, tokens.bounds[-1:])
    return replace(tokens, bounds=bounds, documents=offsets(parts)[tokens.documents])


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


def offsets(lengths: np.ndarray) -> np.ndarray:
    """(n,) lengths -> (n + 1,) int64: where each begins, and where the last ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
