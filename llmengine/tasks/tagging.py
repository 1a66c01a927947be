"""A tag for each word: names, parts of speech, …; spans as BIO tags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from llmengine import metrics
from llmengine.data.examples import IGNORED
from llmengine.data.template import Inputs, owned, spans
from llmengine.data.tokenizer import Tokenizer
from llmengine.metrics import Judgement
from llmengine.metrics.spans import is_of_spans
from llmengine.models.crf import ChainField
from llmengine.tasks.reading import Reading, ReadingExamples, blocks, by_sequence
from llmengine.tasks.rows import placed, tell_unknown, texts_of, wrong
from llmengine.tasks.task import Answer, Row

OUTSIDE, BEGIN, INSIDE = "O", "B-", "I-"


@dataclass(frozen=True)
class TaggingOptions:
    crf: bool = False
    """The tags of a sentence are one outcome, a linear-chain conditional random field (Lafferty et al. 2001)."""
    constrained: bool = True
    """Answers are valid BIO: I-X follows B-X or I-X only. Of a type without B-X among the labels nothing is asked."""
    stride: int | None = None
    """The tokens that two windows of a long sentence share; None: a quarter of max_length."""


class Window(NamedTuple):
    """A part of a sentence with special tokens. words: those of which it gives the tags; places: of their first pieces
    in inputs.ids."""

    inputs: Inputs
    words: list[int]
    places: list[int]


class Chain(NamedTuple):
    """field: scores of steps. steps (tags, tags), [from, to], and begins (tags,): which ones BIO allows."""

    field: ChainField
    steps: Tensor
    begins: Tensor


class Tagging(Reading):
    """The first piece of each word is labelled, other pieces and special tokens have no label.

    A sentence longer than max_length becomes overlapping windows; each word has its tag from the window in which it
    stands nearest to the middle. A word that gives no token (of control characters, say) is no label's; its answer is
    "O", or inside the span around it.
    """

    name = "tagging"
    objective = "tagging"
    columns: ClassVar[dict[str, str]] = {"words": "a list of words", "tags": "a list of their tags"}
    asked = ("words",)
    Options = TaggingOptions
    pairs = False

    def __init__(self, tokenizer: Tokenizer, max_length: int, labels: Sequence[str], options: TaggingOptions) -> None:
        super().__init__(tokenizer, max_length, labels, options)
        self._room = max_length - self.templates[0].added
        self._stride = min(max_length // 4, self._room - 1) if options.stride is None else options.stride
        if not 0 <= self._stride < self._room:
            raise ValueError(
                f"task 'tagging': stride must be 0 to {self._room - 1} (below max_length {max_length} without special "
                f"tokens), got {options.stride}"
            )
        self._places = {label: i for i, label in enumerate(self.labels)}
        # words of running text follow a space, which some vocabularies keep as a part of the word
        together, apart = tokenizer.encodings(["a a"])[0], tokenizer.encodings([["a", "a"]], words=True)[0]
        self._space = together.ids != apart.ids

    @classmethod
    def labels_of(cls, rows: Sequence[Row], options: TaggingOptions) -> tuple[str, ...]:
        """The tags of the rows, sorted, "O" before all others."""
        begins = {True: 0, False: 0}  # of spans: whether a tag begins one as BIO has it
        found: set[str] = set()
        for place, row in placed(rows):
            tags = texts_of(cls.name, row, place, "tags")
            found.update(tags)
            for before, tag in zip(["", *tags], tags, strict=False):
                if tag.startswith(BEGIN) or not allowed(before, tag):
                    begins[tag.startswith(BEGIN)] += 1
        if not found:
            raise ValueError(f"task 'tagging': the {len(rows)} rows have no tag")
        if options.constrained and any(tag.startswith(BEGIN) for tag in found) and begins[False] > begins[True]:
            raise ValueError(
                f"task 'tagging': tags are no BIO: {begins[False]} spans begin with I- and {begins[True]} with B-; "
                "convert them, or set constrained to false"
            )
        return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, tag)))

    def model_fields(self) -> dict[str, Any]:
        return {"n_labels": len(self.labels), "labels": self.labels, "crf": self.options.crf}

    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> ReadingExamples:
        made, block = [], placed(rows)
        for (place, row), windows in zip(block, self._windows(block), strict=True):
            tags = self._tags(row, place)
            for window in windows:
                if window.words:
                    labels = torch.full((len(window.inputs.ids),), IGNORED)
                    labels[window.places] = torch.tensor([tags[word] for word in window.words])
                    made.append(self.example(window.inputs, labels=labels))
        return ReadingExamples(made, self)

    def answers(self, model: Any, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        self.wrap(model)
        best = self._chain(model)
        for block in blocks(rows):
            windows = self._windows(block)
            flat = [window for each in windows for window in each]
            outputs = self.outputs(model, [self.example(window.inputs) for window in flat], _logits, batch_tokens)
            emitted = iter(logits[window.places] for window, logits in zip(flat, outputs, strict=True))
            scores = [
                torch.cat([next(emitted) for _ in each] or [torch.empty(0, len(self.labels))]) for each in windows
            ]
            for (_, row), each, tags in zip(block, windows, self._best(best, scores), strict=True):
                known = dict(zip((word for window in each for word in window.words), tags, strict=True))
                yield {"tags": self._all(known, len(row["words"]))}

    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        """F1 of spans where all labels are tags of spans, and otherwise the accuracy of tags. Tags that the model does
        not know are told, and never right."""
        of_spans, gold = all(map(is_of_spans, self.labels)), []
        for place, row in placed(rows):
            gold.append(self._given(row, place))
            if of_spans and (strange := [tag for tag in gold[-1] if not is_of_spans(tag)]):
                raise wrong(self.name, place, "tags", strange[0], "O, or B-, I- and a type, as the model's tags are")
        tell_unknown(self.name, "tag", self._places, gold, "no answer to them is all right")
        return (metrics.spans if of_spans else metrics.tags)(gold, [answer["tags"] for answer in answers])

    # ---- words and tokens --------------------------------------------------------------------------------------------

    def _windows(self, block: Sequence[tuple[str, Row]]) -> list[list[Window]]:
        """Of each row; none of a sentence without a token."""
        texts = [texts_of(self.name, row, place, "words") for place, row in block]
        if self._space:
            texts = [[word if word.startswith(" ") else " " + word for word in words] for words in texts]
        return [self._cut(encoding) for encoding in self.tokenizer.encodings(texts, words=True)]

    def _cut(self, encoding: Any) -> list[Window]:
        word_of, ids = encoding.word_ids, encoding.ids
        firsts = [i for i, word in enumerate(word_of) if word is not None and (i == 0 or word_of[i - 1] != word)]
        windows, made = spans(len(ids), self._room, self._stride), []
        for (start, stop), (begin, end) in zip(windows, owned(windows), strict=True):
            inputs = self.inputs(ids[start:stop])
            mine = [i for i in firsts if begin <= i < end]
            places = [inputs.starts[0] + i - start for i in mine]
            made.append(Window(inputs, [word_of[i] for i in mine], places))
        return made

    def _given(self, row: Row, place: str) -> list[str]:
        """A row's tags."""
        words, tags = (texts_of(self.name, row, place, column) for column in ("words", "tags"))
        if len(words) != len(tags):
            raise wrong(self.name, place, "tags", tags, f"as many as words, {len(words)}, not {len(tags)}")
        return tags

    def _tags(self, row: Row, place: str) -> list[int]:
        tags = self._given(row, place)
        if unknown := [tag for tag in tags if tag not in self._places]:
            raise wrong(self.name, place, "tags", unknown[0], f"one of {', '.join(self.labels)}")
        return [self._places[tag] for tag in tags]

    # ---- the best tags -----------------------------------------------------------------------------------------------

    def _chain(self, model: Any) -> Chain | None:
        """Scores of steps from tag to tag, and what BIO forbids; None: every step is as good."""
        labels = self.labels
        inside = [tag for tag in labels if tag[:2] == INSIDE and BEGIN + tag[2:] in labels]
        constrained = self.options.constrained and bool(inside)
        if not (constrained or self.options.crf):
            return None
        field = model.heads[self.objective].chain
        if field is None:
            field = ChainField(len(labels)).requires_grad_(False)
            for parameter in field.parameters():
                parameter.zero_()
        steps = torch.ones(len(labels), len(labels), dtype=torch.bool)
        begins = torch.ones(len(labels), dtype=torch.bool)
        for tag in inside if constrained else []:
            begins[self._places[tag]] = False
            steps[:, self._places[tag]] = torch.tensor([allowed(before, tag) for before in labels])
        return Chain(field, steps, begins)

    def _best(self, chain: Chain | None, scores: Sequence[Tensor]) -> list[list[str]]:
        """The tags of each sentence's words from their scores (words, labels)."""
        if chain is None:
            return [[self.labels[i] for i in each.argmax(-1).tolist()] for each in scores]
        if not scores:
            return []
        lengths = [len(each) for each in scores]
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        emissions = torch.cat(list(scores)).to(chain.field.start.device)
        best = chain.field.best(emissions, ends.to(emissions.device), chain.steps, chain.begins)
        return [[self.labels[tag] for tag in tags] for tags in (each.tolist() for each in best.cpu().split(lengths))]

    def _all(self, known: dict[int, str], words: int) -> list[str]:
        """The tags of all words from those of words that gave a token."""
        outside = OUTSIDE if OUTSIDE in self._places else self.labels[0]
        tags, following = [], outside
        for word in reversed(range(words)):
            if word in known:
                following = known[word]
                tags.append(following)
            else:
                tags.append(following if following[:2] == INSIDE else outside)
        return tags[::-1]


def allowed(before: str, tag: str) -> bool:
    """Whether BIO lets a tag follow another, or begin a sentence (before "")."""
    return tag[:2] != INSIDE or before in (BEGIN + tag[2:], tag)


def _logits(out: Any, batch: dict[str, Any]) -> list[Tensor]:
    return by_sequence(out.head_logits["tagging"], batch)
