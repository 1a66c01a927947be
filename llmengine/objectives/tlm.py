"""Translation language modelling (Conneau & Lample 2019): masked tokens of a text and its translation, read together.

To predict a masked word the model can look at both sentences, so that it learns to align them. An example is
[cls] source [sep] [cls] target [sep]: two texts whose positions both begin at 0, as XLM's training code has it; or
without restart_positions [cls] source [sep] target [sep] with positions that run on, like a sentence pair of BERT's.
Any token of either sentence may be masked, as in masked language modelling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import Examples
from llmengine.data.pairs import Pairs
from llmengine.data.pieces import Pieces
from llmengine.data.tokenizer import Tokenizer
from llmengine.data.tokens import tokenize
from llmengine.objectives.masking import Masking, Vocabulary, mask, special_ids

SOURCE, TARGET = 0, 1  # token types


@dataclass(frozen=True, kw_only=True)
class TlmOptions(Masking):
    """Options of masking; and

    restart_positions: the translation's positions begin at 0 again, after a [cls] of its own; else they run on.
    languages: token types tell source (0) and target (1), as XLM's language embeddings do; turn it off for models
        without token types (type_vocab_size below 2).
    """

    restart_positions: bool = True
    languages: bool = True


class TlmExamples(Examples):
    """Sentence pairs of up to sequence_length tokens; masks are drawn anew each epoch.

    Every pair is in one example of an epoch. A pair that is longer loses tokens at the ends: of the longer sentence
    until both are equally long, then of both. Pairs of which a sentence has no token are left out. Options: those of
    `TlmOptions`.
    """

    name = "tlm"
    heads = ("mlm",)
    pairs = True
    Options = TlmOptions

    def __init__(
        self, pairs: Pairs | Iterable[tuple[str, str]], tokenizer: Tokenizer, sequence_length: int, seed: int,
        options: TlmOptions,
    ) -> None:  # fmt: skip
        self._cls, self._sep, mask_id = special_ids("tlm", tokenizer, "cls", "sep", "mask")
        self._between = [self._sep, self._cls] if options.restart_positions else [self._sep]
        self._room = sequence_length - 2 - len(self._between)
        if self._room < 2:
            least = sequence_length - self._room + 2
            raise ValueError(f"objective 'tlm': sequence_length must be {least} or more, got {sequence_length}")
        self._tokens = tokenize(map(_checked, pairs), tokenizer, words=options.by_words)
        whole = np.flatnonzero(np.diff(self._tokens.documents) == 2)
        if not len(whole):
            raise ValueError(
                "objective 'tlm': no pair has tokens on both sides; give pairs of a text and its translation"
            )
        first = self._tokens.documents[whole]
        # _bounds[i]: where pair i's source begins and ends, and where its target, which follows it, ends
        self._bounds = self._tokens.bounds[first[:, None] + np.arange(3)]
        self._sizes = _fitted(np.diff(self._bounds), self._room)
        self._seed, self._options, self._vocabulary = seed, options, Vocabulary.of(tokenizer, mask_id)

    def lengths(self, epoch: int) -> np.ndarray:
        return self._sizes.sum(1) + 2 + len(self._between)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = place
        if not 0 <= index < len(self._sizes):
            raise IndexError(f"example {index} is not in [0, {len(self._sizes)})")
        first, second = self._sizes[index].tolist()
        # between which of both texts' tokens the special ones stand
        at = [0, *[first] * len(self._between), first + second]
        ids = np.insert(
            self._both(self._tokens.ids, index).astype(np.int64), at, [self._cls, *self._between, self._sep]
        )
        special = np.insert(np.zeros(first + second, bool), at, True)
        words = self._tokens.words
        if words is not None:
            words = np.insert(self._both(words, index), at, True)
        draws = Draws(self._seed, epoch, Purpose.MASK, index)
        masked, labels = mask(ids, special, words, self._options, self._vocabulary, draws)
        begin = first + 2  # of the translation, behind the first [sep]
        example = {"input_ids": masked, "labels": labels}
        if self._options.languages:
            example["token_type_ids"] = np.where(np.arange(len(ids)) < begin, SOURCE, TARGET)
        if self._options.restart_positions:
            example["position_ids"] = np.concatenate([np.arange(begin), np.arange(len(ids) - begin)])
        return {name: torch.from_numpy(values) for name, values in example.items()}

    def _both(self, values: np.ndarray | Pieces, index: int) -> np.ndarray:
        """What the tokens of a pair's texts, as far as they fit, have in `values`."""
        (source, target, _), (first, second) = self._bounds[index], self._sizes[index]
        return np.concatenate([values[source : source + first], values[target : target + second]])


def _checked(pair: tuple[str, str]) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise ValueError(f"objective 'tlm': expected pairs (source, target) of strings, got {str(pair)[:60]!r}")
    return pair


def _fitted(sizes: np.ndarray, room: int) -> np.ndarray:
    """Tokens of source and target (pairs, 2), of which no more than `room` together are kept."""
    shorter = np.minimum(sizes.min(1), room // 2)[:, None]
    # the longer one has what the shorter one leaves; of two that are equally long the source keeps an odd token
    kept = np.minimum(sizes, room - shorter)
    over = kept.sum(1) > room
    kept[over] = [room - room // 2, room // 2]
    return kept
