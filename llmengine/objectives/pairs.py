"""Sentence pairs: [cls] A [sep] B [sep] with masked tokens, and one label for the pair.

Pairs are made as by create_pretraining_data (Devlin et al. 2019). Sentences of a document are gathered until they have
the tokens wanted (sequence_length, sometimes fewer). What then becomes A and B, and which label they get, is the
objective's. Where A and B exceed sequence_length, the longer one loses tokens at a random end.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Examples, Latest
from llmengine.data.pieces import Pieces
from llmengine.data.shards import Corpus, corpus_tokens
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.masking import Masking, Vocabulary, check_share, mask, special_ids

SPECIALS = 3  # [CLS] A [SEP] B [SEP]
Row = tuple[int, int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class PairOptions(Masking):
    """Options of masking, and short_fraction: of the pairs are made for fewer tokens than sequence_length, drawn
    evenly, so that the model meets short texts too.
    """

    short_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("short_fraction", self.short_fraction)


@dataclass(frozen=True)
class Pairs:
    """Token spans of segments A and B (pairs, 2) int64, and labels (pairs,)."""

    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray


class PairExamples(Examples):
    """[CLS] A [SEP] B [SEP] with token types 0 and 1; pairs and masks are drawn anew each epoch.

    Sentences longer than half a sequence are cut into several.
    """

    name: str
    label: str
    """The model's argument."""

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: PairOptions
    ) -> None:
        self._cls, self._sep, mask_id = special_ids(self.name, tokenizer, "cls", "sep", "mask")
        if sequence_length < SPECIALS + 2:
            raise ValueError(
                f"objective {self.name!r}: sequence_length must be {SPECIALS + 2} or more, got {sequence_length}"
            )
        self._room = sequence_length - SPECIALS
        self._tokens = corpus_tokens(
            documents, tokenizer, sentences=True, longest=self._room // 2, words=options.by_words
        )
        if len(self._tokens.documents) == 1:
            raise ValueError(f"objective {self.name!r}: the documents hold no token; give more text")
        self._check_corpus()
        self._seed, self._short_fraction, self._masking = seed, options.short_fraction, options
        self._vocabulary = Vocabulary.of(tokenizer, mask_id)
        self._pairs = Latest(self._pair)

    @abstractmethod
    def _check_corpus(self) -> None:
        """That the corpus gives pairs."""

    @abstractmethod
    def _pair_document(self, document: int, draws: Draws, rows: list[Row]) -> None:
        """Appends (A's first token, its end, B's first, its end, label) of each pair that begins in a document."""

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
        masked, labels = mask(ids, special, words, self._masking, self._vocabulary, draws)
        return {
            "input_ids": torch.from_numpy(masked),
            "labels": torch.from_numpy(labels),
            "token_type_ids": torch.from_numpy(types),
            self.label: torch.tensor(int(pairs.labels[index])),
        }

    @staticmethod
    def _with_specials(
        values: np.ndarray | Pieces, a: tuple[int, int], b: tuple[int, int], specials: tuple
    ) -> np.ndarray:
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
        rows: list[Row] = []
        for document in range(len(self._tokens.documents) - 1):
            self._pair_document(document, Draws(self._seed, epoch, Purpose.PAIR, document), rows)
        table = np.array(rows, np.int64).reshape(-1, 5)
        return Pairs(table[:, 0:2], table[:, 2:4], table[:, 4])

    def _wanted(self, short: float, size: float) -> int:
        """How many tokens a pair is made for, by two draws."""
        return 2 + int(size * (self._room - 1)) if short < self._short_fraction else self._room

    def _gather(self, at: int, stop: int, wanted: int) -> int:
        """The end of the segments from `at` on that reach the wanted tokens, `stop` at the latest."""
        bounds = self._tokens.bounds
        return min(int(bounds.searchsorted(bounds[at] + wanted)), stop)
