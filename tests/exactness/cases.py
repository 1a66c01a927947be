"""Every head on every family it goes with, tiny; ragged examples for each, and the forms in which a batch is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmengine import Transformer, TransformerConfig
from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import IGNORED, pack
from llmengine.objectives.plm import ranks

Example = dict[str, Tensor]
VOCABULARY, LABELS, CHOICES = 53, 3, 2
LENGTHS = [7, 3, 12, 4, 9, 5, 12, 6]
WITHOUT = 1  # this example has no label, where the head knows such a thing

_SHAPE = {
    "vocab_size": VOCABULARY, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 24, "dropout": 0.0,
    "embed_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0,
    "classifier_dropout": 0.0, "init_std": 0.2, "pad_token_id": 0, "n_labels": LABELS,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"preset": "bert-tiny", "pooler": "none"},
    "roberta": {"preset": "roberta-base"},
    "albert": {"preset": "albert-base", "n_layers": 2, "d_embed": 8, "pooler": "none"},
    "electra": {"preset": "electra-small", "d_embed": 8},
    "xlnet": {"preset": "xlnet-tiny", "n_layers": 2},
    "gpt2": {"preset": "gpt-tiny", "summary": "last"},
    "llama": {"preset": "llama-7b", "n_kv_heads": 1, "summary": "last"},
    "bart": {"preset": "bart-base"},
    "t5": {"preset": "t5-small", "d_head": 8},
}
ENCODERS = ("bert", "roberta", "albert", "electra")
ALL = tuple(FAMILIES)


@dataclass(frozen=True)
class Case:
    """A head on a family. fields: what the head asks of the config."""

    head: str
    family: str
    objectives: tuple[str, ...]
    fields: dict[str, Any]
    label: Callable[[Case, Tensor, int], Example]
    """(this, an example's ids, its number) -> the arguments of the model that are labels, or go with them."""

    @property
    def name(self) -> str:
        return f"{self.head}-{self.family}"

    @property
    def config(self) -> TransformerConfig:
        shape = _SHAPE | FAMILIES[self.family] | {"objectives": list(self.objectives)} | self.fields
        if shape["preset"] not in ("xlnet-tiny", "t5-small"):
            shape["max_positions"] = 16
        for role in ("bos_token_id", "eos_token_id", "decoder_start_token_id"):
            shape[role] = 2 if role != "decoder_start_token_id" or self.seq2seq else None
        return TransformerConfig.from_dict(shape)

    @property
    def seq2seq(self) -> bool:
        return self.family in ("bart", "t5")

    @property
    def always_labelled(self) -> bool:
        """Whether there is no label that asks for no loss."""
        return self.fields.get("problem") in ("multi", "regression")

    def model(self, dtype: torch.dtype) -> Transformer:
        """In training mode without dropout; biases and norms away from their initial zeros and ones."""
        torch.manual_seed(0)
        model = Transformer(self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.to(dtype).train()

    def examples(self) -> list[Example]:
        """Of unequal lengths and label counts. Multiple choice: an example has CHOICES sequences of one length."""
        return [self._example(i, length) for i, length in enumerate(LENGTHS)]

    def without_labels(self) -> list[Example]:
        """The same, none with a label."""
        return [
            {name: torch.full_like(x, IGNORED) if is_label(name) else x for name, x in example.items()}
            for example in self.examples()
        ]

    def _example(self, i: int, length: int) -> Example:
        g = torch.Generator().manual_seed(i)
        shape = (CHOICES, length) if self.head == "choice" else (length,)
        ids = torch.randint(3, VOCABULARY, shape, generator=g)
        example = {"input_ids": ids}
        if self.config.type_vocab_size > 1 or self.family == "xlnet":
            example["token_type_ids"] = (torch.arange(length) > length // 2).long().expand(shape).clone()
        read = ids
        if self.seq2seq:
            read = torch.randint(3, VOCABULARY, (*shape[:-1], length // 2 + 2), generator=g)
            start = torch.full((*shape[:-1], 1), 2)
            example["decoder_input_ids"] = torch.cat([start, read[..., :-1]], -1)
        return example | self.label(self, read, i)

    def items(self, examples: Iterable[Example]) -> dict[str, int]:
        """How many labels of each kind these examples have, as the model's num_items_in_batch."""
        counts = {"tokens": 0, "sequences": 0}
        for example in examples:
            if self.always_labelled:
                counts["sequences"] += 1
                continue
            for name, x in example.items():
                if is_label(name) and name != "end_positions":  # an answer is one label
                    x = x[1:] if self.head == "clm" else x
                    counts["sequences" if x.dim() == 0 else "tokens"] += int((x != IGNORED).sum())
        return counts


def is_label(name: str) -> bool:
    return name.startswith("label") or name.endswith(("_label", "start_positions", "end_positions"))


# ---- labels ----------------------------------------------------------------------------------------------------------


def _some(x: Tensor, i: int) -> Tensor:
    """A part of x kept as labels, none of the example that has none."""
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(100 + i)) < 0.5
    return torch.where(kept & (i != WITHOUT), x, IGNORED)


def _one(value: int, i: int) -> Tensor:
    return torch.tensor(IGNORED if i == WITHOUT else value)


def _tokens(case: Case, ids: Tensor, i: int) -> Example:
    return {"labels": _some(ids, i)}


def _pairs(name: str) -> Callable[[Case, Tensor, int], Example]:
    # another example has no pair label, so that both kinds are ragged each in its way
    return lambda case, ids, i: {"labels": _some(ids, i), name: _one(i % 2, i if i != 4 else WITHOUT)}


def _replaced(case: Case, ids: Tensor, i: int) -> Example:
    return {"labels": _some(ids % 2, i)}


def _tags(case: Case, ids: Tensor, i: int) -> Example:
    return {"labels": _some(ids % LABELS, i)}


def _permuted(case: Case, ids: Tensor, i: int) -> Example:
    predicted = np.arange(len(ids)) % 3 == 0
    predicted[-2:] = False
    query, key = ranks(predicted, np.arange(len(ids)) >= len(ids) - 2, None, Draws(0, 0, Purpose.RANK, i))
    at = torch.from_numpy(np.flatnonzero(predicted))
    return {
        "query_ranks": torch.from_numpy(query), "key_ranks": torch.from_numpy(key), "target_positions": at,
        "labels": ids[at] if i != WITHOUT else torch.full_like(at, IGNORED),
    }  # fmt: skip


def _class(case: Case, ids: Tensor, i: int) -> Example:
    if case.fields["problem"] == "single":
        return {"labels": _one(i % LABELS, i)}
    numbers = torch.randn(LABELS, generator=torch.Generator().manual_seed(i))
    return {"labels": numbers if case.fields["problem"] == "regression" else (numbers > 0).float()}


def _answer(case: Case, ids: Tensor, i: int) -> Example:
    first = i % (len(ids) - 1)
    return {"start_positions": _one(first, i), "end_positions": _one(first + 1, i)}


def _choice(case: Case, ids: Tensor, i: int) -> Example:
    return {"labels": _one(i % CHOICES, i)}


def _case(head: str, family: str, label: Callable, *objectives: str, **fields: Any) -> Case:
    return Case(head, family, objectives or (head,), fields, label)


CASES = [
    *(_case("mlm", family, _tokens) for family in ENCODERS),
    _case("nsp", "bert", _pairs("next_sentence_label"), "mlm", "nsp", pooler="cls_tanh"),
    _case("sop", "albert", _pairs("sentence_order_label"), "mlm", "sop", pooler="cls_tanh"),
    *(_case("rtd", family, _replaced) for family in ("electra", "bert")),
    _case("plm", "xlnet", _permuted),
    *(_case("clm", family, _tokens) for family in ("gpt2", "llama")),
    *(_case("seq2seq", family, _tokens) for family in ("bart", "t5")),
    *(
        _case(f"classification-{problem}", family, _class, "classification", problem=problem)
        for problem in ("single", "multi", "regression")
        for family in ALL
    ),
    *(_case("tagging", family, _tags) for family in ALL),
    *(_case("tagging-crf", family, _tags, "tagging", crf=True) for family in ALL),
    *(_case("qa", family, _answer) for family in ALL),
    *(_case("choice", family, _choice) for family in ALL if family not in ("bart", "t5")),
]


# ---- batches ---------------------------------------------------------------------------------------------------------


def _of_tokens(case: Case, examples: list[Example]) -> tuple[list[str], list[str]]:
    """The names of what has a value per token (or target), and of what has one per example."""
    several = ("labels",) if case.head.startswith("classification") else ()
    names = list(examples[0])
    per_token = [name for name in names if examples[0][name].dim() and name not in several]
    return per_token, [name for name in names if name not in per_token]


def packed(case: Case, examples: list[Example]) -> dict[str, Any]:
    """One after another, without padding."""
    per_token, per_example = _of_tokens(case, examples)
    rows = [{name: example[name] for name in per_token} for example in examples]
    if case.head == "choice":
        rows = [{name: x[choice] for name, x in row.items()} for row in rows for choice in range(CHOICES)]
    return pack(rows) | {name: torch.stack([example[name] for example in examples]) for name in per_example}


def padded(case: Case, examples: list[Example], side: str, length: int = max(LENGTHS)) -> dict[str, Any]:
    """(batch, length), padded on one side. Padding holds tokens, types and labels that must not matter. An
    encoder-decoder's target is always padded on the right: its positions are its columns."""
    per_token, per_example = _of_tokens(case, examples)
    shifts = [length - example["input_ids"].shape[-1] if side == "left" else 0 for example in examples]
    batch: dict[str, Any] = {name: torch.stack([example[name] for example in examples]) for name in per_example}
    for name in per_token:
        values = [example[name] for example in examples]
        target = case.seq2seq and name != "input_ids"
        if name == "target_positions":
            values = [x + shift for x, shift in zip(values, shifts, strict=True)]
        at_right = target or (case.head == "plm" and name in ("labels", "target_positions")) or side == "right"
        filler = {"target_positions": -1}.get(name, IGNORED if case.head == "plm" and name == "labels" else 1)
        batch[name] = torch.stack([_padded(x, length, at_right, filler) for x in values])
    for prefix in ("", "decoder_") if case.seq2seq else ("",):
        ones = [torch.ones_like(example[f"{prefix}input_ids"]) for example in examples]
        batch[f"{prefix}attention_mask"] = torch.stack([_padded(x, length, prefix or side == "right", 0) for x in ones])
    if case.config.positions == "learned" and case.config.position_of == "column":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if not case.seq2seq:
        for name in ("start_positions", "end_positions"):
            if name in batch:
                batch[name] = torch.where(batch[name] == IGNORED, IGNORED, batch[name] + torch.tensor(shifts))
    return batch


def _padded(x: Tensor, length: int, at_right: bool | str, value: int) -> Tensor:
    missing = length - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing) if at_right else (missing, 0), value=value)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module, batches: Iterable[dict[str, Any]], items: Any = None) -> dict[str, Tensor]:
    """Every parameter's gradient of the batches' losses together; a parameter that no loss reaches has zeros."""
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=items).loss.backward()
    return collect(model)


def collect(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def distance(ours: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest element of the other."""
    assert ours.keys() == other.keys()
    largest = max(float(x.abs().max()) for x in other.values())
    assert largest > 0, "a gradient of zeros proves nothing"
    return max(float((ours[name] - other[name]).abs().max()) for name in other) / largest
