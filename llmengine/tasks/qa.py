"""Answers to questions that are parts of a text (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmengine import metrics
from llmengine.data.examples import IGNORED
from llmengine.data.template import Inputs, spans
from llmengine.data.tokenizer import Tokenizer
from llmengine.metrics import Judgement
from llmengine.tasks.reading import Reading, SequenceExamples, blocks, by_sequence
from llmengine.tasks.rows import integer, placed, tell, text_of, texts_of, value_of, wrong
from llmengine.tasks.task import Answer, Row


@dataclass(frozen=True)
class QAOptions:
    doc_stride: int | None = None
    """The tokens that two windows of a long context share; None: a third of max_length."""
    max_question_tokens: int | None = None
    """Longer questions lose their last tokens; None: a sixth of max_length."""
    max_answer_tokens: int = 30
    """The longest answer that is given."""
    unanswerable: bool = False
    """The data have questions without an answer (answers of no text), and "" may be answered."""
    threshold: float = 0.0
    """unanswerable: "" is answered where its score exceeds the best answer's by more than this."""
    outside: Literal["cls", "ignore"] = "cls"
    """What is learnt of windows that lack the question's answer: "cls", as if it had none; "ignore", nothing."""

    def __post_init__(self) -> None:
        for name in ("doc_stride", "max_question_tokens", "max_answer_tokens"):
            value, least = getattr(self, name), 0 if name == "doc_stride" else 1
            if value is not None and value < least:
                raise ValueError(f"task 'qa': {name} must be {least} or more, got {value}")
        if self.outside not in ("cls", "ignore"):
            raise ValueError(f"task 'qa': outside {self.outside!r} is neither cls nor ignore")
        if not math.isfinite(self.threshold):
            raise ValueError(f"task 'qa': threshold must be finite, got {self.threshold}")


class Window(NamedTuple):
    """A question and a part of its context. The context's tokens begin … end - 1 stand from `place` on in inputs.ids;
    cls: where a window without an answer has its label."""

    inputs: Inputs
    begin: int
    end: int
    place: int
    cls: int

    def holds(self, span: tuple[int, int]) -> bool:
        """Whether it has these tokens of the context, the first to the last."""
        return self.begin <= span[0] <= span[1] < self.end


class Reader(NamedTuple):
    """A question's windows, and of each token of the context its first character and the one behind its last."""

    context: str
    windows: list[Window]
    starts: np.ndarray
    ends: np.ndarray

    def tokens(self, start: int, end: int) -> tuple[int, int]:
        """The first and the last token of the characters start … end - 1; the last is less where no token has them.

        Of tokens with the same characters (the bytes of one, say) the outer ones; as transformers' recipe otherwise.
        """
        starts, ends = self.starts, self.ends
        first = int(np.searchsorted(starts, start, side="right")) - 1
        if first < 0 or ends[first] <= start:
            first += 1
        last = int(np.searchsorted(ends, end, side="left"))
        if last == len(ends) or starts[last] >= end:
            last -= 1
        while 0 < first < len(starts) and (starts[first - 1], ends[first - 1]) == (starts[first], ends[first]):
            first -= 1
        while 0 <= last < len(ends) - 1 and (starts[last + 1], ends[last + 1]) == (starts[last], ends[last]):
            last += 1
        return first, last


class QA(Reading):
    """Question and context are a pair; contexts longer than max_length become overlapping windows.

    The answer is learnt of each window that holds all of it. Of answers the first one is learnt, and all are right.
    A window without an answer has its label at the token that stands for the whole: cls, else bos, else the first.
    """

    name = "qa"
    objective = "qa"
    columns: ClassVar[dict[str, str]] = {
        "question": "the question",
        "context": "the text that holds the answer",
        "answers": "{text: [answer, …], answer_start: [its first character's place in context, …]}; empty lists: none",
    }
    asked = ("question", "context")
    Options = QAOptions
    limit = "max_question_tokens"

    def __init__(self, tokenizer: Tokenizer, max_length: int, labels: Sequence[str], options: QAOptions) -> None:
        super().__init__(tokenizer, max_length, labels, options)
        self.max_question_tokens = options.max_question_tokens or max(max_length // 6, 1)
        taken = self.templates[1].added + self.max_question_tokens
        room = max_length - taken
        if room < 1:
            raise ValueError(
                f"task 'qa': max_length {max_length} leaves no token for the context beside {self.templates[1].added} "
                f"special tokens and max_question_tokens {self.max_question_tokens}; give max_length {taken + 1} or "
                "more, or less of the question"
            )
        self._stride = min(max_length // 3, room - 1) if options.doc_stride is None else options.doc_stride
        if self._stride >= room:
            raise ValueError(
                f"task 'qa': doc_stride ({self._stride}) must be less than the {room} tokens of the context that a "
                f"window holds (max_length {max_length} less special tokens and max_question_tokens "
                f"{self.max_question_tokens})"
            )

    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> SpanExamples:
        block, made, lost = placed(rows), [], 0
        readers, truncated = self._read(block)
        for (place, row), reader in zip(block, readers, strict=True):
            span = self._span(row, place, reader)
            lost += span is not None and not any(window.holds(span) for window in reader.windows)
            for window in reader.windows:
                start, end = self._labels(window, span)
                made.append(self.example(window.inputs, start_positions=start, end_positions=end))
        tell(self.name, truncated, len(rows), self.cut)
        tell(self.name, lost, len(rows), f"rows have an answer that no window holds whole, and that is not learnt: "
             f"max_length {self.max_length}, of which two windows share {self._stride} tokens")  # fmt: skip
        return SpanExamples(made, self, truncated)

    def answers(self, model: Any, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        self.wrap(model)
        truncated = 0
        for block in blocks(rows):
            readers, cut = self._read(block)
            truncated += cut
            flat = [self.example(window.inputs) for reader in readers for window in reader.windows]
            outputs = iter(self.outputs(model, flat, _logits, batch_tokens))
            for reader in readers:
                yield self._answer(reader, [next(outputs) for _ in reader.windows])
        tell(self.name, truncated, len(rows), self.cut)

    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        gold = [_texts(row, place) for place, row in placed(rows)]
        return metrics.answers(gold, [answer["answer"] for answer in answers])

    # ---- windows -----------------------------------------------------------------------------------------------------

    def _read(self, block: Sequence[tuple[str, Row]]) -> tuple[list[Reader], int]:
        """Of placed rows, and how many of their questions were cut."""
        contexts = [text_of(self.name, row, place, "context") for place, row in block]
        questions = [text_of(self.name, row, place, "question").lstrip() for place, row in block]
        readers, truncated, most = [], 0, self.max_question_tokens
        encodings = zip(self.tokenizer.encodings(questions), self.tokenizer.encodings(contexts), strict=True)
        for context, (question, encoding) in zip(contexts, encodings, strict=True):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            windows = self._windows(question.ids[:most], encoding.ids)
            readers.append(Reader(context, windows, offsets[:, 0], offsets[:, 1]))
            truncated += len(question.ids) > most
        return readers, truncated

    def _windows(self, question: list[int], context: list[int]) -> list[Window]:
        room = self.max_length - self.templates[1].added - len(question)
        made = []
        for begin, end in spans(len(context), room, self._stride) or [(0, 0)]:
            inputs = self.inputs(question, context[begin:end])
            marks = (self.tokenizer.cls_id, self.tokenizer.bos_id)
            cls = next((inputs.ids.index(mark) for mark in marks if mark in inputs.ids), 0)
            made.append(Window(inputs, begin, end, inputs.starts[1], cls))
        return made

    def _span(self, row: Row, place: str, reader: Reader) -> tuple[int, int] | None:
        """The first answer's first and last token in the context; None: there is none."""
        texts = _texts(row, place)
        if not texts:
            if self.options.unanswerable:
                return None
            raise wrong(self.name, place, "answers", row["answers"], "an answer, or option unanswerable")
        places = row["answers"].get("answer_start")
        start = integer(places[0]) if isinstance(places, Sequence) and len(places) == len(texts) else None
        if start is None:
            raise wrong(self.name, place, "answers.answer_start", places, f"as many numbers as text, {len(texts)}")
        end = start + len(texts[0])
        if start < 0 or not texts[0] or reader.context[start:end] != texts[0]:
            found = reader.context[max(start, 0) : end]
            raise wrong(self.name, place, "answers.text", texts[0], f"what context has at character {start}, {found!r}")
        return reader.tokens(start, end)

    def _labels(self, window: Window, span: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        if span is not None and window.holds(span):
            shift = window.place - window.begin
            return torch.tensor(span[0] + shift), torch.tensor(span[1] + shift)
        unknown = span is not None and (self.options.outside == "ignore" or span[0] > span[1])
        label = torch.tensor(IGNORED if unknown else window.cls)
        return label, label

    # ---- the best answer ---------------------------------------------------------------------------------------------

    def _answer(self, reader: Reader, logits: Sequence[Tensor]) -> Answer:
        """The span of the highest score of all windows. Its own score is the probability among all spans that could be
        answered, and "" where that could be."""
        solid = [bool(reader.context[start:end].strip()) for start, end in zip(reader.starts, reader.ends, strict=True)]
        best, found = -math.inf, (0, 0)
        every: list[Tensor] = []
        for window, each in zip(reader.windows, logits, strict=True):
            tokens = each[window.place : window.place + window.end - window.begin].double()
            scores = self._spans(tokens, torch.tensor(solid[window.begin : window.end], dtype=torch.bool))
            if scores.numel() and (value := float(scores.max())) > best:
                start, length = divmod(int(scores.argmax()), scores.shape[1])
                best, found = value, (window.begin + start, window.begin + start + length)
            every.append(scores.flatten())
        if self.options.unanswerable:
            none = min(float(each[window.cls].sum()) for window, each in zip(reader.windows, logits, strict=True))
            every.append(torch.tensor([none], dtype=torch.float64))
            if none - best > self.options.threshold:
                return {"answer": "", "start": 0, "end": 0, "score": _share(none, every)}
        if best == -math.inf:
            return {"answer": "", "start": 0, "end": 0, "score": 1.0}
        start, end = int(reader.starts[found[0]]), int(reader.ends[found[1]])
        text = reader.context[start:end]
        start, end = start + len(text) - len(text.lstrip()), end - (len(text) - len(text.rstrip()))
        return {"answer": reader.context[start:end], "start": start, "end": end, "score": _share(best, every)}

    def _spans(self, tokens: Tensor, solid: Tensor) -> Tensor:
        """Logits (tokens, 2) -> scores (tokens, max_answer_tokens): of the span that begins at a token and ends as many
        tokens behind it; -inf where none does. A span neither begins nor ends with white space."""
        starts, ends = tokens.masked_fill(~solid[:, None], -math.inf).unbind(1)
        most = min(self.options.max_answer_tokens, len(tokens))
        if most == 0:
            return tokens.new_empty(0, 1)
        behind = torch.nn.functional.pad(ends, (0, most - 1), value=-math.inf)
        return starts[:, None] + behind.unfold(0, most, 1)


class SpanExamples(SequenceExamples):
    counted = "start_positions"


def _share(score: float, every: Sequence[Tensor]) -> float:
    """The probability of a score among all."""
    return math.exp(score - float(torch.cat(list(every)).logsumexp(0)))


def _logits(out: Any, batch: dict[str, Any]) -> list[Tensor]:
    return by_sequence(out.head_logits["qa"], batch)


def _texts(row: Row, place: str) -> list[str]:
    """The answers' texts."""
    answers = value_of("qa", row, place, "answers")
    if not isinstance(answers, Mapping):
        raise wrong("qa", place, "answers", answers, "{text: [...], answer_start: [...]}")
    return texts_of("qa", answers, place, "text")
