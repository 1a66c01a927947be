"""Permutation language modelling (Yang et al. 2019): spans of a text are predicted in a random order of its tokens.

A sequence is text [sep] [cls]; one token in k of it is predicted. Spans of n words, n from 1 to longest_gram with
probability proportional to 1 / n, are each given n * k tokens of context, divided evenly at random between left and
right; when the text ends before enough tokens are chosen, single ones are added.

The order is a random permutation within each block of perm_size tokens, block after block. Text that is not predicted
is seen by all, and itself sees nothing else. A predicted token sees that text and what precedes it in the order; [sep]
and [cls] are seen by what follows them. The tokens themselves are never masked: the content stream holds the truth,
so that a prediction depends on the ones before it. Memory of an earlier segment is not used: the sequences
of a batch do not continue those of the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Examples
from llmengine.data.shards import Corpus, corpus_tokens
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.cutting import Cuts
from llmengine.objectives.masking import special_ids

TEXT, CLS = 0, 2  # token types


@dataclass(frozen=True, kw_only=True)
class PlmOptions:
    """Options; the defaults are XLNet's.

    k: one token in k is predicted: tokens // k, one at least.
    longest_gram: the most words of a span. whole_word: spans are of whole words; else every token counts as a word.
    perm_size: tokens of a block within which the order is random; None: the whole sequence.
    """

    k: int = 6
    longest_gram: int = 5
    perm_size: int | None = None
    whole_word: bool = True

    def __post_init__(self) -> None:
        for name in ("k", "longest_gram", "perm_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"objective: {name} must be 1 or more, got {value}")


class PlmExamples(Examples):
    """Text [sep] [cls] of up to sequence_length tokens, none across documents; orders are drawn anew each epoch.

    Every token of the corpus is in exactly one sequence of an epoch. Options: those of `PlmOptions`.
    """

    heads = ("plm",)
    family = "xlnet"
    Options = PlmOptions

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: PlmOptions
    ) -> None:
        self._sep, self._cls = special_ids("plm", tokenizer, "sep", "cls")
        if sequence_length < 4:
            raise ValueError(f"objective 'plm': sequence_length must be 4 or more, got {sequence_length}")
        self._tokens = corpus_tokens(documents, tokenizer, words=True)
        if not len(self._tokens.ids):
            raise ValueError("objective 'plm': the documents hold no token; give more text")
        self._cuts = Cuts(self._tokens, sequence_length - 2, seed)
        self._seed, self._options = seed, options

    def lengths(self, epoch: int) -> np.ndarray:
        return self._cuts.lengths(epoch) + 2

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        span, options = self._cuts.span(epoch, index), self._options
        ids = np.concatenate([self._tokens.ids[span], [self._sep, self._cls]]).astype(np.int64)
        words = self._tokens.words
        begins = words[span] if options.whole_word and words is not None else np.ones(len(ids) - 2, bool)
        chosen = choose(begins, max(1, len(ids) // options.k), options, Draws(self._seed, epoch, Purpose.MASK, index))
        draws = Draws(self._seed, epoch, Purpose.RANK, index)
        query_ranks, key_ranks = ranks(np.append(chosen, [False, False]), 2, options.perm_size, draws)
        targets = np.flatnonzero(chosen)
        types = np.full(len(ids), TEXT)
        types[-1] = CLS
        arrays = {
            "input_ids": ids, "token_type_ids": types, "query_ranks": query_ranks, "key_ranks": key_ranks,
            "target_positions": targets, "labels": ids[targets],
        }  # fmt: skip
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


def choose(words: np.ndarray, count: int, options: PlmOptions, draws: Draws) -> np.ndarray:
    """(tokens,) bool: which are predicted, min(count, tokens) of them. words (tokens,) bool: where a word begins."""
    chosen = np.zeros(len(words), bool)
    starts = np.flatnonzero(words)
    edges = np.append(starts, len(words))
    sizes = np.cumsum(1 / np.arange(1, options.longest_gram + 1))
    left = min(count, len(words))
    at = 0
    while left:
        size, before = draws.uniform(2)
        words_wanted = 1 + int((sizes / sizes[-1]).searchsorted(size, "right"))
        context = words_wanted * options.k
        before = int(before * context)
        first = int(starts.searchsorted(at + before))
        if first + words_wanted > len(starts):
            break
        # as many whole words as there are still tokens to choose
        last = min(first + words_wanted, int(edges.searchsorted(edges[first] + left, "right")) - 1)
        if last == first:
            break
        chosen[edges[first] : edges[last]] = True
        left -= int(edges[last] - edges[first])
        at = int(edges[last]) + context - before
    others = np.flatnonzero(~chosen)
    chosen[others[draws.order(len(others))[:left]]] = True
    return chosen


def ranks(predicted: np.ndarray, specials: int, perm_size: int | None, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """(query_ranks, key_ranks) of a sequence's tokens, the last `specials` of which are special.

    A token sees the keys of lower rank than its query's, and itself unless it is predicted.
    """
    size = perm_size or len(predicted)
    blocks = range(0, len(predicted), size)
    order = np.concatenate([begin + draws.order(min(size, len(predicted) - begin)) for begin in blocks])
    seen_by_all = ~predicted
    seen_by_all[len(predicted) - specials :] = False
    key_ranks = np.where(seen_by_all, -1, order)
    return key_ranks + ~predicted, key_ranks
