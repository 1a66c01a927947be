"""Causal language modelling: every token predicted from what precedes it (Radford et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmengine.data.examples import Examples
from llmengine.data.shards import Corpus, corpus_tokens
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.cutting import Cuts
from llmengine.objectives.masking import special_ids


class ClmExamples(Examples):
    """Sequences of up to sequence_length tokens, none across documents; each document ends with the eos token.

    Every token of the corpus is in exactly one sequence of an epoch. labels are the input_ids: the model shifts them.
    """

    heads = ("clm",)
    architecture = "decoder"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """None so far."""

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: Options
    ) -> None:
        (eos,) = special_ids("clm", tokenizer, "eos")
        if sequence_length < 3:
            raise ValueError(f"objective 'clm': sequence_length must be 3 or more, got {sequence_length}")
        self._tokens = corpus_tokens(documents, tokenizer, end=eos)
        if not len(self._tokens.ids):
            raise ValueError("objective 'clm': the documents hold no token; give more text")
        self._cuts = Cuts(self._tokens, sequence_length, seed, shortest=2)

    def lengths(self, epoch: int) -> np.ndarray:
        return self._cuts.lengths(epoch)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        ids = torch.from_numpy(self._tokens.ids[self._cuts.span(epoch, index)].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}
