"""BART's noise (Lewis et al. 2019): what is done to a text that the model is to restore.

Sentences are permuted; then spans of words are each replaced by one mask (text infilling); then tokens are deleted,
tokens are inserted, and the text is rotated, where the options ask for it.

Text infilling draws Poisson lengths until they sum up to the words to be covered; the last one is cut to fit. A span
of length zero is a mask inserted anywhere. The others begin at distinct random words and end with the text at the
latest. They may overlap: a span that begins inside another has no mask of its own, and fewer words are covered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmengine.data.draws import Draws
from llmengine.objectives.masking import check_share

REPLACEMENTS = ("mask", "masks", "nothing")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Options of noise; the defaults are BART's.

    permute_fraction: of the sentences change places among each other.
    mask_fraction: of the words are covered by spans, rounded up.
    mean_span: the mean of the spans' lengths in words; 0: every span is one word (token masking).
    replace_by: what stands for a span: one "mask", as many "masks" as it had tokens, or "nothing".
    random_share: of the spans get random tokens instead of masks; of insertions too.
    delete_fraction: of the tokens are left out. insert_fraction: of the tokens is how many masks are inserted.
    rotate_share: of the texts begin at a token drawn evenly, and end with what precedes it.
    whole_word: spans are of whole words; else every token counts as a word.
    """

    permute_fraction: float = 1.0
    mask_fraction: float = 0.3
    mean_span: float = 3.0
    replace_by: str = "mask"
    random_share: float = 0.1
    delete_fraction: float = 0.0
    insert_fraction: float = 0.0
    rotate_share: float = 0.0
    whole_word: bool = True

    def __post_init__(self) -> None:
        for name in ("permute_fraction", "mask_fraction", "random_share", "delete_fraction", "insert_fraction"):
            check_share(name, getattr(self, name))
        check_share("rotate_share", self.rotate_share)
        if not (self.mean_span == 0 or 0.1 <= self.mean_span <= 100):
            raise ValueError(f"objective: mean_span must be 0, or in [0.1, 100], got {self.mean_span}")
        if self.replace_by not in REPLACEMENTS:
            raise ValueError(f"objective: replace_by must be one of {', '.join(REPLACEMENTS)}, got {self.replace_by!r}")

    def longest(self, tokens: np.ndarray) -> np.ndarray:
        """The most tokens that texts of so many can have under noise."""
        return tokens + _share(tokens, self.insert_fraction)

    def room(self, tokens: int) -> int:
        """The longest text that has at most so many tokens under noise; 1 at least."""
        return max(1, max(n for n in range(tokens + 1) if self.longest(np.array(n)) <= tokens))


@dataclass(frozen=True)
class Replacing:
    """What stands for tokens that are hidden: masks, or tokens drawn from the whole vocabulary."""

    mask_id: int
    vocab_size: int
    random_share: float

    def draw(self, count: int, draws: Draws) -> np.ndarray:
        at_random = draws.uniform(count) < self.random_share
        return np.where(at_random, self.tokens(count, draws), self.mask_id)

    def tokens(self, count: int, draws: Draws) -> np.ndarray:
        return (draws.uniform(count) * self.vocab_size).astype(np.int64)


def add_noise(
    ids: np.ndarray, words: np.ndarray, stops: np.ndarray, options: Noise, mask_id: int, vocab_size: int, draws: Draws
) -> np.ndarray:
    """A text's tokens under noise, at most `options.longest` of them.

    ids (tokens,) int64. words, stops (tokens,) bool: where a word begins; which tokens can end a sentence.
    """
    replacing = Replacing(mask_id, vocab_size, options.random_share)
    if options.permute_fraction:
        order = permuted(stops, options.permute_fraction, draws)
        ids, words = ids[order], words[order]
    if options.mask_fraction:
        ids = infilled(ids, words, options, replacing, draws)
    if options.delete_fraction and len(ids):
        ids = ids[np.sort(draws.order(len(ids))[round(len(ids) * options.delete_fraction) :])]
    if options.insert_fraction:
        ids = inserted(ids, int(_share(len(ids), options.insert_fraction)), replacing, draws)
    if options.rotate_share and len(ids) and draws.uniform(1)[0] < options.rotate_share:
        ids = np.roll(ids, -draws.below(len(ids)))
    return ids


def permuted(stops: np.ndarray, fraction: float, draws: Draws) -> np.ndarray:
    """(tokens,): the text's places in the order of its permuted sentences, ceil(fraction * sentences) of which move.

    The last of several stops in a row ends a sentence; the text's end always does.
    """
    ends = stops & ~np.append(stops[1:], False)
    sentences = np.split(np.arange(len(stops)), np.flatnonzero(ends[:-1]) + 1)
    moving = draws.order(len(sentences))[: int(_share(len(sentences), fraction))]
    order = np.arange(len(sentences))
    order[moving] = moving[draws.order(len(moving))]
    return np.concatenate([sentences[i] for i in order])


def infilled(ids: np.ndarray, words: np.ndarray, options: Noise, replacing: Replacing, draws: Draws) -> np.ndarray:
    """The text with its spans replaced; never longer than it was."""
    starts = np.flatnonzero(words | (np.arange(len(ids)) == 0))  # a text may begin inside a word
    lengths = span_lengths(int(_share(len(starts), options.mask_fraction)), options.mean_span, draws)
    insertions = int((lengths == 0).sum())
    lengths = lengths[lengths > 0]
    first = draws.order(len(starts))[: len(lengths)]
    edges = np.append(starts, len(ids))
    begin, end = edges[first], edges[np.minimum(first + lengths, len(starts))]
    inside = _covered(begin + 1, end, len(ids))  # beyond the first token of some span
    begins = np.zeros(len(ids), bool)
    begins[begin] = True
    text = ids.copy()
    if options.replace_by == "masks":
        hidden = np.flatnonzero(begins | inside)
        text[hidden] = replacing.mask_id
        # of spans that get random tokens, all tokens are random
        spans = draws.uniform(len(begin)) < replacing.random_share
        at_random = np.flatnonzero(_covered(begin[spans], end[spans], len(ids)))
        text[at_random] = replacing.tokens(len(at_random), draws)
    elif options.replace_by == "mask":
        text[begin] = replacing.draw(len(begin), draws)
        text = text[~inside]
    else:
        text = text[~(begins | inside)]
    return inserted(text, min(insertions, len(ids) - len(text)), replacing, draws)


def span_lengths(budget: int, mean: float, draws: Draws) -> np.ndarray:
    """Poisson lengths that sum up to `budget`, zeros among them; with mean 0, ones."""
    if mean == 0:
        return np.ones(budget, np.int64)
    below = _poisson(mean)
    lengths = np.zeros(0, np.int64)
    while lengths.sum() < budget:
        lengths = np.append(lengths, below.searchsorted(draws.uniform(max(budget, 8)), "right"))
    total = np.cumsum(lengths)
    last = int(total.searchsorted(budget))
    lengths[last : last + 1] -= total[last : last + 1] - budget
    return lengths[: last + 1] if budget else lengths[:0]


def inserted(ids: np.ndarray, count: int, replacing: Replacing, draws: Draws) -> np.ndarray:
    """The text with `count` masks at random places, first and last included."""
    if count == 0:
        return ids
    new = np.zeros(len(ids) + count, bool)
    new[draws.order(len(new))[:count]] = True
    text = np.empty(len(new), ids.dtype)
    text[new] = replacing.draw(count, draws)
    text[~new] = ids
    return text


def _share(count: np.ndarray | int, fraction: float) -> np.ndarray:
    """ceil(count * fraction), without the error of the product."""
    return np.ceil(np.round(np.asarray(count) * fraction, 9)).astype(np.int64)


def _covered(begin: np.ndarray, end: np.ndarray, length: int) -> np.ndarray:
    """(length,) bool: what lies in some of the intervals begin … end - 1."""
    depth = np.zeros(length + 1, np.int64)
    np.add.at(depth, begin, 1)
    np.add.at(depth, end, -1)
    return np.cumsum(depth[:-1]) > 0


def _poisson(mean: float) -> np.ndarray:
    """The probabilities of at most 0, 1, 2, … until they reach 1 in float64."""
    most = int(mean + 12 * math.sqrt(mean) + 20)
    k = np.arange(most)
    return np.cumsum(np.exp(k * math.log(mean) - mean - np.array([math.lgamma(i + 1) for i in k])))
