"""Denoising (Lewis et al. 2019): an encoder-decoder reads a text under noise and writes the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Examples
from llmengine.data.shards import Corpus, corpus_tokens
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.cutting import Cuts
from llmengine.objectives.masking import special_ids
from llmengine.objectives.noise import Noise, add_noise
from llmengine.objectives.seq2seq import source_and_target

STOP = re.compile(r"[.!?…。！？｡][\"'”’»)\]」』）]*$")


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions(Noise):
    """Options of noise, and decoder_start: the token that the decoder's input begins with, "eos" (BART's) or "bos"."""

    decoder_start: str = "eos"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_start not in ("bos", "eos"):
            raise ValueError(f"objective: decoder_start must be bos or eos, got {self.decoder_start!r}")


class DenoisingExamples(Examples):
    """Source [bos] text under noise [eos], target [bos] text [eos], each of up to sequence_length tokens.

    Every token of the corpus is in exactly one target of an epoch, none across documents; noise is drawn anew each
    epoch. A sentence ends at a token that ends in a full stop, a question or an exclamation mark. Options: those of
    `DenoisingOptions`.
    """

    heads = ("seq2seq",)
    architecture = "encoder_decoder"
    family = "bart"
    decoder_start = "eos"
    Options = DenoisingOptions

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: DenoisingOptions
    ) -> None:
        self._bos, self._eos, self._mask = special_ids("denoising", tokenizer, "bos", "eos", "mask")
        if sequence_length < 4:
            raise ValueError(f"objective 'denoising': sequence_length must be 4 or more, got {sequence_length}")
        self._tokens = corpus_tokens(documents, tokenizer, words=True)
        if not len(self._tokens.ids):
            raise ValueError("objective 'denoising': the documents hold no token; give more text")
        self._cuts = Cuts(self._tokens, options.room(sequence_length - 2), seed)
        self._seed, self._options = seed, options
        self._vocab_size = tokenizer.vocab_size
        written = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
        self._stops = np.array([bool(STOP.search(token.strip())) for token in written])
        self._start = self._eos if options.decoder_start == "eos" else self._bos

    def lengths(self, epoch: int) -> np.ndarray:
        text = self._cuts.lengths(epoch)
        return self._options.longest(text) + text + 4

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        span = self._cuts.span(epoch, index)
        text = self._tokens.ids[span].astype(np.int64)
        words = self._tokens.words
        begins = words[span] if self._options.whole_word and words is not None else np.ones(len(text), bool)
        draws = Draws(self._seed, epoch, Purpose.NOISE, index)
        noised = add_noise(text, begins, self._stops[text], self._options, self._mask, self._vocab_size, draws)
        source, target = (np.concatenate([[self._bos], x, [self._eos]]) for x in (noised, text))
        return source_and_target(source, target, self._start)
