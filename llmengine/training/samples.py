"""samples.md: what the model makes of the same few texts, before training, at each evaluation and at the end.

The texts are held-out ones (without held-out data: training ones), chosen by the corpus alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from llmengine.data.examples import IGNORED, Examples
from llmengine.data.sentences import split_sentences
from llmengine.data.tokenizer import Tokenizer
from llmengine.files import replace_text
from llmengine.models import Transformer
from llmengine.objectives.electra import Electra
from llmengine.training.markdown import cell, printable
from llmengine.training.metrics import Record
from llmengine.training.observer import Observer
from llmengine.training.predict import continuations, fill, follows, guesses, suspicions, written

if TYPE_CHECKING:
    from llmengine.training.loop import Result
    from llmengine.training.run import Run

FILE = "samples.md"
TEXTS, MASKS, CANDIDATES, PAIRS = 3, 5, 5, 6
PROMPT_WORDS = 7
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 40, "seed": 0}
SECTION = re.compile(r"^## Step (\d+)", re.M)


class Samples(Observer):
    def __init__(self) -> None:
        self._sections: dict[int, str] = {}
        self._writers: list[Writer] = []

    def started(self, run: Run, step: int, records: Sequence[Record]) -> None:
        path = run.folder.path / FILE
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        # as with metrics.jsonl, a resumed run writes anew what came after its checkpoint
        self._sections = {at: text for at, text in _sections(before) if at <= step}
        source = "training" if run.held_out is None else "held-out"
        self._writers = choose((run.held_out or run.batches).examples, run.tokenizer, source)
        if step == 0:
            self._write(run, 0)

    def recorded(self, run: Run, record: Record) -> None:
        if record["kind"] == "evaluation":
            self._write(run, record["step"])

    def finished(self, run: Run, result: Result) -> None:
        if result.step not in self._sections:
            self._write(run, result.step)

    def _write(self, run: Run, step: int) -> None:
        title = f"## Step {step} of {run.steps}" + (" (before training)" if step == 0 else "")
        parts = [title, *(part for writer in self._writers for part in writer.write(run.model, run.tokenizer))]
        self._sections[step] = "\n\n".join(parts)
        text = "\n\n".join(["# Samples", *(self._sections[at] for at in sorted(self._sections))])
        replace_text(run.folder.path / FILE, text + "\n")


def _sections(text: str) -> Iterator[tuple[int, str]]:
    """The sections of a file: (step, text)."""
    heads = list(SECTION.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    for head, end in zip(heads, ends, strict=False):
        yield int(head[1]), text[head.start() : end].strip()


# ---- texts -----------------------------------------------------------------------------------------------------------


def choose(examples: Examples, tokenizer: Tokenizer, source: str) -> list[Writer]:
    """What is asked of the model in every section; `source` names the texts."""
    if "clm" in examples.heads:
        return [Prompts(list(_prompts(examples, tokenizer)), source)]
    all_of_them = [examples[0, i] for i in _spread(len(examples), 60)]
    if "seq2seq" in examples.heads:
        return [Targets(all_of_them[:TEXTS], source)]
    if "rtd" in examples.heads:
        return [Replaced(all_of_them[:TEXTS], source)]
    if "plm" in examples.heads:
        return [Hidden(all_of_them[:TEXTS], source)]
    running = [e for e in all_of_them if pair_label(e) == 0]
    masked = [_masked(e, tokenizer) for e in sorted(running, key=lambda e: -len(e["input_ids"]))[:TEXTS]]
    writers: list[Writer] = [Masks(masked, source)]
    if {"nsp", "sop"} & set(examples.heads):
        random = [e for e in all_of_them if pair_label(e) == 1]
        both = [*running[: PAIRS // 2], *random[: PAIRS // 2]]
        writers.append(Pairs([_unmasked(e) for e in both], source))
    return writers


def _spread(length: int, most: int) -> list[int]:
    """Up to `most` numbers below `length`, evenly spread."""
    count = min(length, most)
    return [length * i // count for i in range(count)]


def pair_label(example: dict[str, Tensor]) -> int:
    """Of a pair: 0 where the second segment follows the first; of other examples 0."""
    return int(example.get("next_sentence_label", example.get("sentence_order_label", 0)))


def _unmasked(example: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = example["labels"]
    return {**example, "input_ids": example["input_ids"].where(labels == IGNORED, labels)}


def _masked(example: dict[str, Tensor], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The text with masks at a few of its predicted places, words rather than marks and endings; the rest unmasked."""
    labels, truth = example["labels"], _unmasked(example)["input_ids"]
    predicted = [int(i) for i in (labels != IGNORED).nonzero()]
    words = [i for i in predicted if tokenizer.token(int(labels[i])).isalpha()] or predicted
    places = [words[i] for i in _spread(len(words), MASKS)]
    labels = labels.new_full(labels.shape, IGNORED)
    labels[places] = truth[places]
    ids = truth.clone()
    ids[places] = _mask_id(tokenizer)
    return {**example, "input_ids": ids, "labels": labels}


def _prompts(examples: Examples, tokenizer: Tokenizer) -> Iterator[str]:
    """The beginnings of a sentence in a few sequences."""
    for i in _spread(len(examples), TEXTS):
        text = tokenizer.decode(examples[0, i]["input_ids"].tolist())
        # the first sentence of a sequence may have lost its beginning
        sentences = [s.split() for s in split_sentences(text)[1:]]
        words = next((s for s in sentences if len(s) > PROMPT_WORDS), None) or text.split()
        yield " ".join(words[:PROMPT_WORDS])


# ---- writers ---------------------------------------------------------------------------------------------------------


class Writer(Protocol):
    """Parts of a section."""

    def write(self, model: Any, tokenizer: Tokenizer) -> Iterator[str]: ...


@dataclass(frozen=True)
class Prompts:
    prompts: list[str]
    source: str

    def write(self, model: Transformer, tokenizer: Tokenizer) -> Iterator[str]:
        yield f"Beginnings of {self.source} sentences, and how the model goes on."
        texts = continuations(model, tokenizer, self.prompts, **SAMPLING)
        for prompt, text in zip(self.prompts, texts, strict=True):
            yield f"**{prompt}** …\n\n~~~~text\n{printable(text)}\n~~~~"


@dataclass(frozen=True)
class Masks:
    examples: list[dict[str, Tensor]]
    source: str

    def write(self, model: Transformer, tokenizer: Tokenizer) -> Iterator[str]:
        yield f"Masked words of {self.source} texts: the model's first candidates with their probabilities."
        for example in self.examples:
            ids, types = example["input_ids"], example.get("token_type_ids")
            truths = example["labels"][example["labels"] != IGNORED].tolist()
            kinds = None if types is None else types.tolist()
            filling = fill(model, ids.tolist(), _mask_id(tokenizer), token_type_ids=kinds, top=CANDIDATES)
            rows = ["| truth | candidates |", "|---|---|"]
            for truth, candidates in zip(truths, filling.candidates, strict=True):
                cells = (_candidate(tokenizer, token, share, token == truth) for token, share in candidates)
                rows.append(f"| {_code(tokenizer.token(truth))} | {', '.join(cells)} |")
            yield f"~~~~text\n{_text(tokenizer, ids)}\n~~~~\n\n" + "\n".join(rows)


@dataclass(frozen=True)
class Pairs:
    examples: list[dict[str, Tensor]]
    source: str

    def write(self, model: Transformer, tokenizer: Tokenizer) -> Iterator[str]:
        yield f"Pairs of {self.source} segments: does the second follow the first?"
        rows = ["| end of the first | beginning of the second | truth | model: it follows |", "|---|---|---|---|"]
        for example in self.examples:
            ids, types = example["input_ids"], example["token_type_ids"]
            first, second = (_text(tokenizer, ids[types == kind]) for kind in (0, 1))
            other = "random" if "next_sentence_label" in example else "precedes"
            truth = other if pair_label(example) else "follows"
            share = follows(model, ids, types)
            rows.append(f"| … {cell(first[-70:])} | {cell(second[:70])} … | {truth} | {100 * share:.0f} % |")
        yield "\n".join(rows)


@dataclass(frozen=True)
class Targets:
    examples: list[dict[str, Tensor]]
    source: str

    def write(self, model: Transformer, tokenizer: Tokenizer) -> Iterator[str]:
        yield f"What the encoder reads of {self.source} texts, what is to be written, and what the model writes."
        for example in self.examples:
            texts = {"reads": example["input_ids"], "target": example["labels"], "writes": written(model, example)}
            rows = (
                f"{name:8}{_line(tokenizer.decode(ids.tolist(), skip_special=False))}" for name, ids in texts.items()
            )
            yield "~~~~text\n" + "\n".join(rows) + "\n~~~~"


@dataclass(frozen=True)
class Replaced:
    examples: list[dict[str, Tensor]]
    source: str

    def write(self, model: Electra, tokenizer: Tokenizer) -> Iterator[str]:
        yield f"Tokens of {self.source} texts that the generator replaced: what the discriminator thinks of them."
        for example in self.examples:
            replaced, suspicion = suspicions(model, example)
            truth = _unmasked(example)["input_ids"]
            rows = ["| truth | in its place | model: it was replaced |", "|---|---|---|"]
            for i in (replaced != truth).nonzero().flatten().tolist()[:MASKS]:
                old, new = (_code(tokenizer.token(int(ids[i]))) for ids in (truth, replaced))
                rows.append(f"| {old} | {new} | {100 * float(suspicion[i]):.0f} % |")
            yield f"~~~~text\n{_text(tokenizer, replaced)}\n~~~~\n\n" + "\n".join(rows)


@dataclass(frozen=True)
class Hidden:
    examples: list[dict[str, Tensor]]
    source: str

    def write(self, model: Transformer, tokenizer: Tokenizer) -> Iterator[str]:
        yield f"Hidden tokens of {self.source} texts in the order of prediction: the model's first candidates."
        for example in self.examples:
            candidates = guesses(model, example, top=CANDIDATES)
            order = example["query_ranks"][example["target_positions"]].argsort().tolist()
            rows = ["| truth | candidates |", "|---|---|"]
            for i in order[:MASKS]:
                truth = int(example["labels"][i])
                cells = (_candidate(tokenizer, token, share, token == truth) for token, share in candidates[i])
                rows.append(f"| {_code(tokenizer.token(truth))} | {', '.join(cells)} |")
            yield f"~~~~text\n{printable(tokenizer.decode(example['input_ids'].tolist()))}\n~~~~\n\n" + "\n".join(rows)


def _mask_id(tokenizer: Tokenizer) -> int:
    assert tokenizer.mask_id is not None, "objectives with masks do not begin without one"
    return tokenizer.mask_id


def _text(tokenizer: Tokenizer, ids: Tensor) -> str:
    """Text with its masks, without the other special tokens."""
    hidden = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id}
    return tokenizer.decode([i for i in ids.tolist() if i not in hidden], skip_special=False)


def _line(text: str) -> str:
    """Text on one line."""
    return " ".join(printable(text).split())


def _candidate(tokenizer: Tokenizer, token: int, share: float, right: bool) -> str:
    written = _code(tokenizer.token(token))
    return f"{f'**{written}**' if right else written} {100 * share:.0f} %"


def _code(token: str) -> str:
    return "` " + cell(token) + " `" if "`" in token else f"`{cell(token)}`"
