"""Permutation language modelling (Yang et al. 2019): spans of a text are predicted in a random order of its tokens.

A sequence is text [sep] [cls]; one token in k of it is predicted. Spans of n words, n from 1 to longest_gram with
probability proportional to 1 / n, are each given n * k tokens of context, divided evenly at random between left and
right; when the text ends before enough tokens are chosen, single ones are added.

The order is a random permutation within each block of perm_size tokens, block after block. Text that is not predicted
is seen by all, and itself sees nothing else. A predicted token sees that text and what precedes it in the order; [sep]
and [cls] are seen by what follows them. The tokens themselves are never masked: the content stream holds the truth,
so that a prediction depends on the ones before it.

XLNet's released models were trained on [reuse | A [sep] B [sep] [cls]]: options reuse and two_segments. The first part
has an order of its own and never sees the second, so that its states can serve as memory; the second sees all of the
first. Option memory uses it so: each sequence begins where the reuse part of the one before in its document ends, reads
the states that this part had, and more before it, as keys that all see; they have no gradients. Successive steps of
training read successive sequences (data/streams.py). At the beginning of a document there is none: the paper reuses
memory within a context only. (XLNet's own program joins a file's documents, and memory goes on from one to the next.)
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
from llmengine.objectives.cutting import Cuts, Windows
from llmengine.objectives.masking import check_share, special_ids

TEXT, SECOND, CLS = 0, 1, 2  # token types


@dataclass(frozen=True, kw_only=True)
class PlmOptions:
    """Options. Yang et al. (2019) have k 6, longest_gram 5, whole_word; and for sequence_length 512 two_segments with
    random_next 0.5, reuse 256, perm_size 256, memory 384.

    k: one token in k is predicted: tokens // k, one at least.
    longest_gram: the most words of a span. whole_word: spans are of whole words; else every token counts as a word.
    perm_size: tokens of a block within which the order is random; None: the whole sequence, or part of it.
    two_segments: the text, or what follows its reuse part, is divided at the beginning of a word, as A [sep] B [sep];
        random_next of the Bs are replaced by as many tokens from a random place of the corpus.
    reuse: tokens of the first part, which does not see the rest; a text that is not two tokens longer has no such part.
    memory: the most tokens whose states are remembered of earlier sequences' reuse parts; 0: nothing is. A sequence
        then begins `reuse` tokens behind the one before, so that a token is in several sequences of an epoch.
    """

    k: int = 6
    longest_gram: int = 5
    perm_size: int | None = None
    whole_word: bool = True
    two_segments: bool = False
    random_next: float = 0.5
    reuse: int = 0
    memory: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "longest_gram", "perm_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"objective: {name} must be 1 or more, got {value}")
        for name in ("reuse", "memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective: {name} must be 0 or more, got {getattr(self, name)}")
        if self.memory and not self.reuse:
            raise ValueError(
                f"objective: memory ({self.memory}) is of the reuse part of earlier texts; give reuse too, half of "
                "sequence_length, say"
            )
        check_share("random_next", self.random_next)


class PlmExamples(Examples):
    """Text [sep] [cls] of up to sequence_length tokens, none across documents; orders are drawn anew each epoch.

    Every token of the corpus is in exactly one text of an epoch (with memory, in all that begin `reuse` tokens after
    each other); with two_segments, those whose place a random second
    segment takes are left out of that epoch. A text of one token has no second segment. Options: those of `PlmOptions`.
    """

    heads = ("plm",)
    family = "xlnet"
    Options = PlmOptions

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: PlmOptions
    ) -> None:
        self._sep, self._cls = special_ids("plm", tokenizer, "sep", "cls")
        specials = 3 if options.two_segments else 2
        least = max(4, options.reuse + specials + 2 if options.reuse else specials + 2)
        if sequence_length < least:
            why = f" (reuse is {options.reuse})" if options.reuse else ""
            raise ValueError(f"objective 'plm': sequence_length must be {least} or more{why}, got {sequence_length}")
        self._tokens = corpus_tokens(documents, tokenizer, words=True)
        if not len(self._tokens.ids):
            raise ValueError("objective 'plm': the documents hold no token; give more text")
        longest = sequence_length - specials
        self._windows = Windows(self._tokens, longest, options.reuse) if options.memory else None
        self._cuts = self._windows or Cuts(self._tokens, longest, seed)
        self._seed, self._options = seed, options

    def lengths(self, epoch: int) -> np.ndarray:
        texts = self._cuts.lengths(epoch)
        return texts + np.where(self._options.two_segments & (texts > 1), 3, 2)

    def follows(self, epoch: int) -> np.ndarray | None:
        return None if self._windows is None else self._windows.follows()

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        text, words, second, reuse = self._text(epoch, index)
        n = len(text)
        specials = [second, n, n] if second < n else [n, n]
        ids = np.insert(text.astype(np.int64), specials, [self._sep] * (len(specials) - 1) + [self._cls])
        special = np.insert(np.zeros(n, bool), specials, True)
        predicted = np.zeros(len(ids), bool)
        count = max(1, len(ids) // self._options.k)
        predicted[~special] = self._chosen(words, reuse, count, Draws(self._seed, epoch, Purpose.MASK, index))
        draws = Draws(self._seed, epoch, Purpose.RANK, index)
        query_ranks, key_ranks = ranks(predicted, special, self._options.perm_size, draws, reuse)
        targets = np.flatnonzero(predicted)
        types = np.where((np.arange(len(ids)) > second) & (second < n), SECOND, TEXT)
        types[-1] = CLS
        arrays = {
            "input_ids": ids, "token_type_ids": types, "query_ranks": query_ranks, "key_ranks": key_ranks,
            "target_positions": targets, "labels": ids[targets],
        }  # fmt: skip
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}

    def _text(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """A text: its ids, where its words begin (tokens,), where its second segment begins (its end: there is none),
        and how many tokens its reuse part has."""
        span, options, tokens = self._cuts.span(epoch, index), self._options, self._tokens
        assert tokens.words is not None  # asked for
        ids, words = tokens.ids[span], tokens.words[span]
        reuse = options.reuse if len(ids) >= options.reuse + 2 else 0
        if not options.two_segments or len(ids) < 2:
            return ids, words, len(ids), reuse
        split, is_random, begin = Draws(self._seed, epoch, Purpose.PAIR, index).uniform(3)
        places = np.arange(reuse + 1, len(ids))
        begins = places[words[reuse + 1 :]]
        begins = begins if len(begins) else places
        second = int(begins[int(split * len(begins))])
        if is_random < options.random_next:
            size = len(ids) - second
            start = int(begin * (len(tokens.ids) - size + 1))
            ids, words = (
                np.append(ours[:second], all_of_them[start : start + size])
                for ours, all_of_them in ((ids, tokens.ids), (words, tokens.words))
            )
            words[second] = True
        return ids, words, second, reuse

    def _chosen(self, words: np.ndarray, reuse: int, count: int, draws: Draws) -> np.ndarray:
        """(tokens,) bool: which of a text's tokens are predicted, as many of the reuse part as its share is."""
        begins = words if self._options.whole_word else np.ones(len(words), bool)
        early = count * reuse // len(words)
        chosen = choose(begins[:reuse], early, self._options, draws) if reuse else np.zeros(0, bool)
        return np.append(chosen, choose(begins[reuse:], count - early, self._options, draws))


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


def ranks(
    predicted: np.ndarray, special: np.ndarray, perm_size: int | None, draws: Draws, reuse: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(query_ranks, key_ranks) of a sequence's tokens; predicted, special (tokens,) bool.

    A token sees the keys of lower rank than its query's, and itself unless it is predicted. The first `reuse` tokens
    have an order of their own, below all ranks of the rest.
    """
    if reuse:
        early, late = (
            ranks(predicted[part], special[part], perm_size, draws) for part in (slice(reuse), slice(reuse, None))
        )
        query, key = (np.append(a, b + reuse + 1) for a, b in zip(early, late, strict=True))
        return query, key
    size = perm_size or len(predicted)
    blocks = range(0, len(predicted), size)
    order = np.concatenate([begin + draws.order(min(size, len(predicted) - begin)) for begin in blocks])
    key_ranks = np.where(predicted | special, order, -1)
    return key_ranks + ~predicted, key_ranks
