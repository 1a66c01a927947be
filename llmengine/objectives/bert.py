"""BERT's pretraining: masked tokens, and whether the second segment follows the first (Devlin et al. 2019).

A random number of the sentences gathered is segment A. Segment B is the rest, or, half of the time, sentences of
another document; the rest then goes back and begins the next pair.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmengine.data.draws import Draws
from llmengine.data.shards import Corpus
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.masking import check_share
from llmengine.objectives.pairs import SPECIALS, PairExamples, PairOptions, Row

IS_NEXT, IS_RANDOM = 0, 1  # Hugging Face's labels


@dataclass(frozen=True, kw_only=True)
class BertOptions(PairOptions):
    """Options of masking and pairs, and random_next: of the pairs have a random second segment."""

    random_next: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("random_next", self.random_next)


class BertExamples(PairExamples):
    """Pairs of which the second segment follows the first, or is of another document.

    Every sentence is in the A or the true B of some pair of each epoch, and only truncation takes tokens of it away.
    Options: those of `BertOptions`.
    """

    name = "bert"
    label = "next_sentence_label"
    heads = ("mlm", "nsp")
    Options = BertOptions

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: BertOptions
    ) -> None:
        super().__init__(documents, tokenizer, sequence_length, seed, options)
        self._random_next = options.random_next

    def _check_corpus(self) -> None:
        documents, bounds = len(self._tokens.documents) - 1, self._tokens.bounds
        if documents == 1 and (len(bounds) < 3 or bounds[-2] < self._room):
            raise ValueError(
                f"objective 'bert': one document of {bounds[-1]} tokens is too short for random second segments "
                f"at sequence_length {self._room + SPECIALS}; give more documents or text, or a smaller sequence_length"
            )

    def _pair_document(self, document: int, draws: Draws, rows: list[Row]) -> None:
        bounds = self._tokens.bounds
        at, stop = (int(i) for i in self._tokens.documents[document : document + 2])
        while at < stop:
            short, size, split, is_random, other, start = draws.uniform(6).tolist()
            wanted = self._wanted(short, size)
            end = self._gather(at, stop, wanted)
            middle = at + 1 + int(split * (end - at - 1))
            if middle < end and is_random >= self._random_next:
                rows.append((*bounds[[at, middle, middle, end]].tolist(), IS_NEXT))
                at = end
                continue
            begin, limit = self._elsewhere(document, at, end, other, start)
            left = max(1, wanted - int(bounds[middle] - bounds[at]))
            rows.append((*bounds[[at, middle, begin, self._gather(begin, limit, left)]].tolist(), IS_RANDOM))
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
