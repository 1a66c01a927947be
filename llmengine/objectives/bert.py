"""BERT's pretraining: masked tokens, and whether the second segment follows the first (Devlin et al. 2019).

Pairs are made as by create_pretraining_data. Sentences of a document are gathered until they have the tokens wanted
(sequence_length, sometimes fewer). A random number of them is segment A. Segment B is the rest, or, half of the time,
sentences of another document; the rest then goes back and begins the next pair. Where A and B exceed
sequence_length, the longer one loses tokens at a random end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Examples, Latest
from llmengine.data.sentences import split_sentences
from llmengine.data.tokenizer import Tokenizer
from llmengine.data.tokens import tokenize
from llmengine.objectives.masking import Masking, check_share, mask, special_ids

SPECIALS = 3  # [CLS] A [SEP] B [SEP]
IS_NEXT, IS_RANDOM = 0, 1  # Hugging Face's labels


@dataclass(frozen=True, kw_only=True)
class BertOptions(Masking):
    """Options of masking, and of pairs.

    random_next: of the pairs have a random second segment. short_fraction: of the pairs are made for fewer tokens
    than sequence_length, drawn evenly, so that the model meets short texts too.
    """

    random_next: float = 0.5
    short_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("random_next", self.random_next)
        check_share("short_fraction", self.short_fraction)


@dataclass(frozen=True)
class Pairs:
    """Token spans of segments A and B (pairs, 2) int64, and labels (pairs,)."""

    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray


class BertExamples(Examples):
    """[CLS] A [SEP] B [SEP] with token types 0 and 1; pairs and masks are drawn anew each epoch.

    Sentences longer than half a sequence are cut into several; every sentence is in the A or the true B of some pair of
    each epoch, and only truncation takes tokens of it away. Options: those of `BertOptions`.
    """

    heads = ("mlm", "nsp")
    Options = BertOptions

    def __init__(
        self, documents: Sequence[str], tokenizer: Tokenizer, sequence_length: int, seed: int, options: BertOptions
    ) -> None:
        self._cls, self._sep, self._mask = special_ids("bert", tokenizer, "cls", "sep", "mask")
        if sequence_length < SPECIALS + 2:
            raise ValueError(f"objective 'bert': sequence_length must be {SPECIALS + 2} or more, got {sequence_length}")
        self._room = sequence_length - SPECIALS
        self._tokens = tokenize(
            map(split_sentences, documents), tokenizer, longest=self._room // 2, words=options.whole_word
        )
        self._check_corpus()
        self._seed, self._options = seed, options
        self._vocab_size = tokenizer.vocab_size
        self._pairs = Latest(self._pair)

    def _check_corpus(self) -> None:
        documents, bounds = len(self._tokens.documents) - 1, self._tokens.bounds
        if documents == 0:
            raise ValueError("objective 'bert': the documents hold no token; give more text")
        if documents == 1 and (len(bounds) < 3 or bounds[-2] < self._room):
            raise ValueError(
                f"objective 'bert': one document of {bounds[-1]} tokens is too short for random second segments "
                f"at sequence_length {self._room + SPECIALS}; give more documents or text, or a smaller sequence_length"
            )

    def lengths(self, epoch: int) -> np.ndarray:
        pairs = self._pairs(epoch)
        both = np.diff(pairs.a).ravel() + np.diff(pairs.b).ravel()
        return np.minimum(both, self._room) + SPECIALS

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        pairs = self._pairs(epoch)
        (a0, a1), (b0, b1) = self._truncate(pairs.a[index], pairs.b[index], epoch, index)
        ids = self._with_specials(self._tokens.ids, (a0, a1), (b0, b1), (self._cls, self._sep)).astype(np.int64)
        special = np.zeros(len(ids), bool)
        special[[0, a1 - a0 + 1, -1]] = True
        types = (np.arange(len(ids)) > a1 - a0 + 1).astype(np.int64)
        words = self._tokens.words
        if words is not None:
            words = self._with_specials(words, (a0, a1), (b0, b1), (True, True))
        draws = Draws(self._seed, epoch, Purpose.MASK, index)
        masked, labels = mask(ids, special, words, self._options, self._mask, self._vocab_size, draws)
        return {
            "input_ids": torch.from_numpy(masked),
            "labels": torch.from_numpy(labels),
            "token_type_ids": torch.from_numpy(types),
            "next_sentence_label": torch.tensor(int(pairs.labels[index])),
        }

    @staticmethod
    def _with_specials(values: np.ndarray, a: tuple[int, int], b: tuple[int, int], specials: tuple) -> np.ndarray:
        cls, sep = specials
        return np.concatenate([[cls], values[slice(*a)], [sep], values[slice(*b)], [sep]])

    def _truncate(self, a: np.ndarray, b: np.ndarray, epoch: int, index: int) -> tuple[list[int], list[int]]:
        """Spans of a pair that fits: while it does not, the longer one loses its first or last token."""
        span_a, span_b = a.tolist(), b.tolist()
        excess = span_a[1] - span_a[0] + span_b[1] - span_b[0] - self._room
        if excess > 0:
            for at_front in (Draws(self._seed, epoch, Purpose.TRUNCATE, index).uniform(excess) < 0.5).tolist():
                longer = span_a if span_a[1] - span_a[0] > span_b[1] - span_b[0] else span_b
                longer[0 if at_front else 1] += 1 if at_front else -1
        return span_a, span_b

    # ---- pairs of an epoch -------------------------------------------------------------------------------------------

    def _pair(self, epoch: int) -> Pairs:
        rows: list[tuple[int, int, int, int, int]] = []
        for document in range(len(self._tokens.documents) - 1):
            self._pair_document(document, Draws(self._seed, epoch, Purpose.PAIR, document), rows)
        table = np.array(rows, np.int64).reshape(-1, 5)
        # segments to tokens
        return Pairs(self._tokens.bounds[table[:, 0:2]], self._tokens.bounds[table[:, 2:4]], table[:, 4])

    def _pair_document(self, document: int, draws: Draws, rows: list[tuple[int, int, int, int, int]]) -> None:
        """Appends (A's first segment, its end, B's first, its end, label) for each pair that begins in a document."""
        bounds = self._tokens.bounds
        at, stop = (int(i) for i in self._tokens.documents[document : document + 2])
        while at < stop:
            short, size, split, is_random, other, start = draws.uniform(6).tolist()
            wanted = self._room
            if short < self._options.short_fraction:
                wanted = 2 + int(size * (self._room - 1))
            # as many segments as reach the wanted tokens
            end = min(int(bounds.searchsorted(bounds[at] + wanted)), stop)
            middle = at + 1 + int(split * (end - at - 1))
            if middle < end and is_random >= self._options.random_next:
                rows.append((at, middle, middle, end, IS_NEXT))
                at = end
                continue
            begin, limit = self._elsewhere(document, at, end, other, start)
            left = max(1, wanted - int(bounds[middle] - bounds[at]))
            rows.append((at, middle, begin, min(int(bounds.searchsorted(bounds[begin] + left)), limit), IS_RANDOM))
            at = middle

    def _elsewhere(self, document: int, at: int, end: int, other: float, start: float) -> tuple[int, int]:
        """A random segment of another document, and that document's end.

        Where the corpus is one document, a segment of it outside the pair, segments at … end - 1.
        """
        documents = self._tokens.documents
        count = len(documents) - 1
        if count > 1:
            chosen = int(other * (count - 1))
            first, limit = (int(i) for i in documents[chosen + (chosen >= document) :][:2])
            return first + int(start * (limit - first)), limit
        outside = int(documents[1]) - (end - at)
        chosen = int(start * outside)
        return (chosen, at) if chosen < at else (chosen + end - at, int(documents[1]))
