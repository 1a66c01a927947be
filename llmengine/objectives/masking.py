"""Masked language modelling's choice: which tokens are predicted, and what the model sees in their place."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from llmengine.data.draws import Draws
from llmengine.data.examples import IGNORED
from llmengine.data.tokenizer import Tokenizer

MODES = ("bert", "roberta", "hf")
SPAN_LENGTHS = ("geometric", "harmonic")


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Options of masking; the defaults are BERT's.

    mask_fraction: of a sequence's tokens are predicted.
    mode: how many that is, and what may be drawn. "bert" (Devlin et al. 2019): exactly round(fraction * tokens), one at
        least. "roberta" (Liu et al. 2019, as fairseq does it): fraction * tokens, rounded up or down at random so that
        the mean is right; no special token is drawn. "hf": each token with that probability, as Hugging Face's
        DataCollatorForLanguageModeling does it. The last two may predict nothing in a short sequence.
    mask_share, random_share: of the predicted tokens are replaced by [MASK], and by a token drawn from the whole
        vocabulary; the rest stays as it is.
    max_predictions: the most predicted tokens of a sequence; None: no other limit.
    whole_word: tokens are predicted by whole words; a word that would exceed the number is passed over.
    spans: tokens are predicted by spans (Joshi et al. 2020): from the beginning of the word of a random token, n words,
        n from 1 to longest_span, within a segment; what exceeds the number is cut off. Of a span all tokens are
        replaced alike.
    span_lengths: n's probability is proportional to (1 - span_p) ** n ("geometric"), or to 1 / n ("harmonic": the
        n-grams of Lan et al. 2019, where longest_span is 3).
    """

    mask_fraction: float = 0.15
    mode: str = "bert"
    mask_share: float = 0.8
    random_share: float = 0.1
    max_predictions: int | None = None
    whole_word: bool = False
    spans: bool = False
    span_lengths: str = "geometric"
    span_p: float = 0.2
    longest_span: int = 10

    def __post_init__(self) -> None:
        check_share("mask_fraction", self.mask_fraction)
        check_share("mask_share", self.mask_share)
        check_share("random_share", self.random_share)
        if self.mask_share + self.random_share > 1 + 1e-12:
            raise ValueError(
                f"objective: mask_share ({self.mask_share}) and random_share ({self.random_share}) exceed 1 together"
            )
        if self.max_predictions is not None and self.max_predictions < 1:
            raise ValueError(f"objective: max_predictions must be 1 or more, or none, got {self.max_predictions}")
        for name, allowed in (("mode", MODES), ("span_lengths", SPAN_LENGTHS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"objective: {name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.mode == "hf" and (self.whole_word or self.spans or self.max_predictions is not None):
            raise ValueError(
                'objective: mode "hf" chooses token by token; it has no whole_word, spans, max_predictions'
            )
        if self.whole_word and self.spans:
            raise ValueError("objective: spans are of whole words: give whole_word or spans, not both")
        if not 0 < self.span_p < 1:
            raise ValueError(f"objective: span_p must be in (0, 1), got {self.span_p}")
        if self.longest_span < 1:
            raise ValueError(f"objective: longest_span must be 1 or more, got {self.longest_span}")

    @property
    def by_words(self) -> bool:
        """Whether it matters where words begin."""
        return self.whole_word or self.spans


@dataclass(frozen=True)
class Vocabulary:
    """What may stand in a predicted token's place. special: rising ids."""

    mask: int
    size: int
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, mask: int) -> Vocabulary:
        return cls(mask, tokenizer.vocab_size, tokenizer.special_ids)

    def draw(self, n: int, draws: Draws, *, special: bool) -> np.ndarray:
        """(n,) int64 ids, each alike; `special`: those of special tokens too."""
        left_out = () if special else self.special
        drawn = (draws.uniform(n) * (self.size - len(left_out))).astype(np.int64)
        for token in left_out:
            drawn += drawn >= token
        return drawn


def mask(
    ids: np.ndarray, special: np.ndarray, words: np.ndarray | None, options: Masking, vocabulary: Vocabulary,
    draws: Draws,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(input_ids, labels) of a sequence: labels are the original ids where tokens are predicted, IGNORED elsewhere.

    ids (tokens,) int64. special (tokens,) bool: never predicted. words (tokens,) bool: where words begin, for
    whole_word and spans. Masks as create_pretraining_data of Devlin et al. (2019) does, but for what mode says.
    """
    candidates = np.flatnonzero(~special)
    count = _count(len(ids), options, draws)
    if options.mode == "hf":
        chosen = candidates[draws.uniform(len(candidates)) < options.mask_fraction]
    elif words is None or not options.by_words:
        chosen = candidates[draws.order(len(candidates))[:count]]
    elif options.spans:
        chosen, span = _spans(candidates, words, count, options, draws)
    else:
        chosen = _whole_words(candidates, words, count, draws)
    labels = np.full_like(ids, IGNORED)
    labels[chosen] = ids[chosen]
    masked = ids.copy()
    fate = draws.uniform(len(chosen))
    if options.spans and words is not None:
        fate = fate[span]
    masked[chosen[fate < options.mask_share]] = vocabulary.mask
    drawn = vocabulary.draw(len(chosen), draws, special=options.mode != "roberta").astype(ids.dtype)
    at_random = (fate >= options.mask_share) & (fate < options.mask_share + options.random_share)
    masked[chosen[at_random]] = drawn[at_random]
    return masked, labels


def _count(tokens: int, options: Masking, draws: Draws) -> int:
    """How many tokens are to be predicted, where that is decided beforehand."""
    if options.mode == "roberta":
        count = int(tokens * options.mask_fraction + draws.uniform(1)[0])
    else:
        count = max(1, round(tokens * options.mask_fraction))
    return count if options.max_predictions is None else min(count, options.max_predictions)


def _whole_words(candidates: np.ndarray, words: np.ndarray, count: int, draws: Draws) -> np.ndarray:
    """Places of whole words in random order, `count` tokens at most."""
    begins = words[candidates].copy()
    begins[:1] = True
    # a special token between two candidates parts words too
    begins[1:] |= np.diff(candidates) > 1
    groups = np.split(candidates, np.flatnonzero(begins)[1:])
    chosen: list[int] = []
    for i in draws.order(len(groups)).tolist():
        if len(chosen) >= count:
            break
        if len(chosen) + len(groups[i]) <= count:
            chosen += groups[i].tolist()
    return np.array(chosen, np.int64)


def _spans(
    candidates: np.ndarray, words: np.ndarray, count: int, options: Masking, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """Places of spans of words, min(count, all) tokens in the order of choice, and the number of each one's span."""
    # runs of candidates without a special token between: no span leaves its segment
    part = np.cumsum(np.diff(candidates, prepend=candidates[:1]) > 1)
    begins = words[candidates] | (np.diff(part, prepend=-1) > 0)
    starts = np.flatnonzero(begins)
    edges = np.append(starts, len(candidates))
    n = np.arange(1, options.longest_span + 1)
    lengths = np.cumsum(1 / n if options.span_lengths == "harmonic" else (1 - options.span_p) ** n)
    chosen: list[int] = []
    owner: list[int] = []
    taken = np.zeros(len(candidates), bool)
    count = min(count, len(candidates))
    spans = 0
    while len(chosen) < count:
        size, anchor = draws.uniform(2)
        free = np.flatnonzero(~taken)
        word = int(starts.searchsorted(free[int(anchor * len(free))], "right")) - 1
        last = min(word + 1 + int((lengths / lengths[-1]).searchsorted(size, "right")), len(starts))
        span = np.arange(edges[word], edges[last])
        span = span[(part[span] == part[span[0]]) & ~taken[span]][: count - len(chosen)]
        taken[span] = True
        chosen += candidates[span].tolist()
        owner += [spans] * len(span)
        spans += 1
    return np.array(chosen, np.int64), np.array(owner, np.int64)


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"objective: {name} must be in [0, 1], got {value}")


def special_ids(objective: str, tokenizer: Tokenizer, *roles: str) -> list[int]:
    """The ids of the special tokens that an objective needs."""
    ids = {role: getattr(tokenizer, f"{role}_id") for role in roles}
    if missing := [role for role in roles if ids[role] is None]:
        family = {"denoising": "bart", "span_corruption": "t5", "plm": "xlnet"}.get(objective)
        remedy = f'kind "bpe" and family "{family}"' if family else f'kind "{"bpe" if "eos" in roles else "wordpiece"}"'
        raise ValueError(
            f"objective {objective!r}: the tokenizer has no {', '.join(missing)} token; train one of {remedy}"
        )
    return list(ids.values())


def option_names(options: type) -> list[str]:
    return [field.name for field in fields(options)]
