"""ALBERT's pretraining: masked tokens, and whether two segments are in their order or swapped (Lan et al. 2019).

The sentences gathered are divided at a random place; half of the time the second part comes first. A sentence that
is alone is divided between two of its tokens; a token that is alone is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmengine.data.draws import Draws
from llmengine.data.shards import Corpus
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.masking import check_share
from llmengine.objectives.pairs import PairExamples, PairOptions, Row

IN_ORDER, SWAPPED = 0, 1  # Hugging Face's labels


@dataclass(frozen=True, kw_only=True)
class SopOptions(PairOptions):
    """Options of masking and pairs, and swapped: of the pairs have their segments in the other order."""

    swapped: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("swapped", self.swapped)


class SopExamples(PairExamples):
    """Pairs of consecutive segments, in their order or swapped. Options: those of `SopOptions`.

    Every sentence is in some pair of each epoch, and only truncation takes tokens of it away.
    """

    name = "sop"
    label = "sentence_order_label"
    heads = ("mlm", "sop")
    Options = SopOptions

    def __init__(
        self, documents: Corpus, tokenizer: Tokenizer, sequence_length: int, seed: int, options: SopOptions
    ) -> None:
        super().__init__(documents, tokenizer, sequence_length, seed, options)
        self._swapped = options.swapped

    def _check_corpus(self) -> None:
        tokens = self._tokens.bounds[self._tokens.documents]
        if (tokens[1:] - tokens[:-1]).max() < 2:
            raise ValueError("objective 'sop': no document has two tokens; give more text")

    def _pair_document(self, document: int, draws: Draws, rows: list[Row]) -> None:
        bounds = self._tokens.bounds
        at, stop = (int(i) for i in self._tokens.documents[document : document + 2])
        while at < stop:
            short, size, split, swap = draws.uniform(4).tolist()
            end = self._gather(at, stop, self._wanted(short, size))
            first, last = int(bounds[at]), int(bounds[end])
            middle = int(bounds[at + 1 + int(split * (end - at - 1))])
            if end - at == 1:
                middle = first + 1 + int(split * (last - first - 1))
            at = end
            if last - first < 2:
                continue
            pair = (first, middle, middle, last, IN_ORDER)
            rows.append((middle, last, first, middle, SWAPPED) if swap < self._swapped else pair)
