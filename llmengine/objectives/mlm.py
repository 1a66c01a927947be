"""Masked language modelling over running text, without sentence pairs (Liu et al. 2019)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Examples
from llmengine.data.shards import Corpus, corpus_tokens
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.cutting import Cuts
from llmengine.objectives.masking import Masking, Vocabulary, mask, special_ids


class MlmExamples(Examples):
    """[CLS] text [SEP] of up to sequence_length tokens, none across documents; masks are drawn anew each epoch.

    Every token of the corpus is in exactly one sequence of an epoch. Options: those of `Masking`.
    """

    name = "mlm"
    heads: tuple[str, ...] = ("mlm",)
    Options = Masking

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: Masking
    ) -> None:
        self._cls, self._sep, mask_id = special_ids(self.name, tokenizer, "cls", "sep", "mask")
        if sequence_length < 3:
            raise ValueError(f"objective {self.name!r}: sequence_length must be 3 or more, got {sequence_length}")
        self._tokens = corpus_tokens(documents, tokenizer, words=options.by_words)
        if not len(self._tokens.ids):
            raise ValueError(f"objective {self.name!r}: the documents hold no token; give more text")
        self._cuts = Cuts(self._tokens, sequence_length - 2, seed)
        self._seed, self._options = seed, options
        self._vocabulary = Vocabulary.of(tokenizer, mask_id)

    def lengths(self, epoch: int) -> np.ndarray:
        return self._cuts.lengths(epoch) + 2

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        span = self._cuts.span(epoch, index)
        ids = np.concatenate([[self._cls], self._tokens.ids[span], [self._sep]], dtype=np.int64)
        special = np.zeros(len(ids), bool)
        special[[0, -1]] = True
        words = None
        if self._tokens.words is not None:
            words = np.concatenate([[True], self._tokens.words[span], [True]])
        draws = Draws(self._seed, epoch, Purpose.MASK, index)
        masked, labels = mask(ids, special, words, self._options, self._vocabulary, draws)
        return {"input_ids": torch.from_numpy(masked), "labels": torch.from_numpy(labels)}
