"""Span corruption (Raffel et al. 2020): an encoder-decoder reads a text with spans missing, and writes the spans.

Of a text of n tokens, round(density n) are noise, in round(noise / mean_span) spans (halves are rounded to even; one at
least, and a token that is no noise before each span while there are as many). Noise and the rest are each divided into
that number of parts, every division being as likely as any other; the parts alternate, the text's begins. So a span
never touches another, and the last one ends the text.

The k-th span is sentinel k in the source; the target is sentinel k and the span's tokens, for each k. Both end with
eos.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Examples
from llmengine.data.shards import Corpus, corpus_tokens
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.cutting import Cuts
from llmengine.objectives.masking import special_ids
from llmengine.objectives.seq2seq import source_and_target


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Options; the defaults are T5's.

    density: of the tokens are missing. mean_span: the mean of the spans' lengths in tokens.
    """

    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ValueError(f"objective: density must be in (0, 1), got {self.density}")
        if not self.mean_span >= 1:
            raise ValueError(f"objective: mean_span must be 1 or more, got {self.mean_span}")

    def counts(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(noise tokens, spans) of texts of so many tokens."""
        noise = np.clip(np.round(tokens * self.density), 1, np.maximum(tokens - 1, 1)).astype(np.int64)
        spans = np.clip(np.round(noise / self.mean_span), 1, np.maximum(tokens - noise, 1)).astype(np.int64)
        return noise, spans

    def lengths(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) tokens of texts of so many tokens, each with its eos."""
        noise, spans = self.counts(tokens)
        return tokens - noise + spans + 1, noise + spans + 1

    def longest(self, sequence_length: int) -> int:
        """The most tokens of a text of which both source and target fit."""
        # a source has at least a share 1 - density of the text's tokens, a target at least the other
        most = int(sequence_length / max(1 - self.density, self.density)) + 3
        tokens = np.arange(1, most + 1)
        source, target = self.lengths(tokens)
        return int(tokens[np.maximum(source, target) <= sequence_length].max())


class SpanCorruptionExamples(Examples):
    """Source and target of up to sequence_length tokens; the texts are longer (568 tokens for 512).

    Every token of the corpus is in exactly one text of an epoch, none across documents; spans are drawn anew each
    epoch. Options: those of `SpanCorruption`.
    """

    heads = ("seq2seq",)
    architecture = "encoder_decoder"
    family = "t5"
    decoder_start = "pad"
    Options = SpanCorruption

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: SpanCorruption
    ) -> None:
        self._eos, self._start = special_ids("span_corruption", tokenizer, "eos", "pad")
        if sequence_length < 5:
            raise ValueError(f"objective 'span_corruption': sequence_length must be 5 or more, got {sequence_length}")
        self._sentinels = np.array(tokenizer.sentinel_ids, np.int64)
        longest = options.longest(sequence_length)
        spans = int(options.counts(np.array(longest))[1])
        if len(self._sentinels) < spans:
            raise ValueError(
                f"objective 'span_corruption': texts of {longest} tokens have {spans} spans, but the tokenizer has "
                f'{len(self._sentinels)} sentinels; train one of kind "bpe" and family "t5", or give a smaller '
                "sequence_length or a larger mean_span"
            )
        self._tokens = corpus_tokens(documents, tokenizer)
        if not len(self._tokens.ids):
            raise ValueError("objective 'span_corruption': the documents hold no token; give more text")
        self._cuts = Cuts(self._tokens, longest, seed, shortest=2)
        self._seed, self._options = seed, options

    def lengths(self, epoch: int) -> np.ndarray:
        source, target = self._options.lengths(self._cuts.lengths(epoch))
        return source + target

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        text = self._tokens.ids[self._cuts.span(epoch, index)].astype(np.int64)
        noise = noise_mask(len(text), self._options, Draws(self._seed, epoch, Purpose.NOISE, index))
        begins = noise & ~np.append(False, noise[:-1])
        sentinels = self._sentinels[: begins.sum()]
        # every token stands where it stood; a sentinel before the first of a span
        source, target = text[~noise | begins], text[noise]
        source[begins[~noise | begins]] = sentinels
        target = np.insert(target, np.flatnonzero(begins[noise]), sentinels)
        return source_and_target(np.append(source, self._eos), np.append(target, self._eos), self._start)


def noise_mask(tokens: int, options: SpanCorruption, draws: Draws) -> np.ndarray:
    """(tokens,) bool: which tokens are missing."""
    noise, spans = (int(count) for count in options.counts(np.array(tokens)))
    missing = partition(noise, spans, draws)
    present = partition(tokens - noise, spans, draws) if tokens > noise else np.zeros(1, np.int64)
    lengths = np.stack([present, missing], 1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def partition(items: int, parts: int, draws: Draws) -> np.ndarray:
    """(parts,) lengths of 1 or more that sum up to `items`: every such division is as likely."""
    ends = np.sort(draws.order(items - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], ends, [items]]))
