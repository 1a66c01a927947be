"""Is a step's gradient the same however the batch is cut? Hugging Face's Trainer and models beside llmengine.

    python -m benchmarks.exactness          from the repository's root; writes results/exactness.json, docs/exactness.md

Tiny models of random weights, equal in both libraries; no dropout, float32, CPU. One optimizer step over eight rows,
as one call of the model and as eight micro-batches of one row (gradient_accumulation_steps = 8); the gradient is read
before the optimizer's step, clipping is off. Nothing here is timed, and nothing is asserted: tests/exactness asserts.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import llmengine
from llmengine.data.examples import pack
from tests.exactness.cases import collect
from tests.exactness.trainer import of_trainer
from tests.models.peers import VOCABULARY, hf_model

ROOT = Path(__file__).resolve().parent.parent
ROWS, LONGEST, LABELS, EOS = 8, 12, 3, 2
LENGTHS = [7, 4, 12, 5, 9, 6, 12, 8]
Row = dict[str, Tensor]
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->"


@dataclass(frozen=True)
class Head:
    """A Hugging Face class and the labels that it takes. ignorable: whether a label can ask for no loss."""

    kind: str
    label: Callable[[Tensor, int, bool], Row]
    """(a row's ids, its number, ragged: unequally many labels) -> the arguments that are labels."""
    ignorable: bool = True


def replaced(ids: Tensor, i: int, ragged: bool) -> Row:
    return {"labels": ids % 2}


def tokens(every: int) -> Callable[[Tensor, int, bool], Row]:
    """Labels of tokens, their ids modulo `every`: 1 to all of a row's where ragged, else three of each row."""

    def label(ids: Tensor, i: int, ragged: bool) -> Row:
        count = 1 + (5 * i) % (len(ids) - 1) if ragged else 3
        return {"labels": torch.where(torch.arange(len(ids)) <= count, ids % every, -100)}

    return label


def with_pair(ids: Tensor, i: int, ragged: bool) -> Row:
    return tokens(VOCABULARY)(ids, i, ragged) | {"next_sentence_label": torch.tensor(i % 2)}


def answer(ids: Tensor, i: int, ragged: bool) -> Row:
    return {"start_positions": torch.tensor(i % 3), "end_positions": torch.tensor(i % 3 + 1)}


def one_of(classes: int) -> Callable[[Tensor, int, bool], Row]:
    return lambda ids, i, ragged: {"labels": torch.tensor(i % classes)}


def numbers(ids: Tensor, i: int, ragged: bool) -> Row:
    return {"labels": (torch.arange(LABELS) * (i + 1) % 3 > 0).float()}


HEADS = {
    "token": Head("token", tokens(VOCABULARY)),
    "token and pair": Head("token and pair", with_pair),
    "pair": Head("pair", one_of(2)),
    "replaced": Head("replaced", replaced, ignorable=False),
    "tagging": Head("tagging", tokens(LABELS)),
    "class": Head("class", one_of(LABELS)),
    "multi-label": Head("multi-label", numbers, ignorable=False),
    "regression": Head("regression", numbers, ignorable=False),
    "answer": Head("answer", answer),
    "choice": Head("choice", one_of(2)),
}
CLASSES = {
    "BertForMaskedLM": "token", "BertForPreTraining": "token and pair", "BertForNextSentencePrediction": "pair",
    "BertForSequenceClassification": "class", "BertForTokenClassification": "tagging",
    "BertForQuestionAnswering": "answer", "BertForMultipleChoice": "choice",
    "RobertaForMaskedLM": "token", "RobertaForSequenceClassification": "class",
    "RobertaForTokenClassification": "tagging", "RobertaForQuestionAnswering": "answer",
    "AlbertForMaskedLM": "token", "AlbertForTokenClassification": "tagging",
    "ElectraForMaskedLM": "token", "ElectraForPreTraining": "replaced", "ElectraForSequenceClassification": "class",
    "ElectraForTokenClassification": "tagging", "ElectraForQuestionAnswering": "answer",
    "ModernBertForMaskedLM": "token",
    "BartForConditionalGeneration": "token", "BartForSequenceClassification": "class",
    "BartForQuestionAnswering": "answer", "T5ForConditionalGeneration": "token", "T5ForSequenceClassification": "class",
    "XLNetLMHeadModel": "token", "XLNetForSequenceClassification": "class", "XLNetForTokenClassification": "tagging",
    "XLNetForQuestionAnsweringSimple": "answer",
    "GPT2LMHeadModel": "token", "GPT2ForSequenceClassification": "class", "GPT2ForTokenClassification": "tagging",
    "GPT2ForQuestionAnswering": "answer", "LlamaForCausalLM": "token",
}  # fmt: skip
PROBLEMS = {"multi-label": "multi_label_classification", "regression": "regression"}
# each problem of classification once more
VARIANTS = [(name, kind) for name in ("BertForSequenceClassification",) for kind in PROBLEMS]


# ---- rows and batches ------------------------------------------------------------------------------------------------


def rows_of(model: torch.nn.Module, head: Head, *, ragged: bool) -> list[Row]:
    """Eight rows of unequal lengths, without padding."""
    rows = []
    for i, length in enumerate(LENGTHS):
        g = torch.Generator().manual_seed(i)
        shape = (2, length) if head.kind == "choice" else (length,)
        ids = torch.randint(3, VOCABULARY, shape, generator=g)
        if model.config.is_encoder_decoder:
            ids[..., -1] = EOS  # what BART's and T5's classifiers read
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)} | head.label(ids, i, ragged))
    return rows


def without_labels(row: Row) -> Row:
    """A row of which every label asks for no loss: -100, or for an answer a place outside of the text."""
    kept = ("input_ids", "attention_mask")
    nothing = {name: LONGEST if name.endswith("_positions") else -100 for name in row}
    return {name: x if name in kept else torch.full_like(x, nothing[name]) for name, x in row.items()}


def padded(model: torch.nn.Module, rows: list[Row], side: str) -> list[Row]:
    """Rows of equal lengths. position_ids count from the first token where a model has learned ones and takes them."""
    return [_padded(model, row, side) for row in rows]


def _padded(model: torch.nn.Module, row: Row, side: str) -> Row:
    missing = LONGEST - row["input_ids"].shape[-1]
    pad = (missing, 0) if side == "left" else (0, missing)
    out = {}
    for name, x in row.items():
        per_token = x.dim() and x.shape[-1] == LONGEST - missing and x.dtype == torch.int64
        value = {"input_ids": model.config.pad_token_id or 0, "attention_mask": 0}.get(name, -100)
        if name.endswith("_positions") and side == "left" and not model.config.is_encoder_decoder:
            x = x + missing
        # a target is padded on the right
        sides = (0, missing) if name == "labels" and model.config.is_encoder_decoder else pad
        out[name] = torch.nn.functional.pad(x, sides, value=value) if per_token else x
    if model.config.model_type in ("bert", "albert", "electra", "gpt2", "bart"):
        out["position_ids"] = (out["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return out


def named(model: torch.nn.Module, head: Head, row: Row) -> Row:
    """A row as this library's class takes it: Hugging Face's for sentence pairs alone calls labels what its pretraining
    class, and ours, calls otherwise; its BART takes no position_ids."""
    ours = isinstance(model, llmengine.Transformer)
    if not ours and model.config.model_type == "bart":
        row = {name: x for name, x in row.items() if name != "position_ids"}
    return {"next_sentence_label" if ours and head.kind == "pair" and n == "labels" else n: x for n, x in row.items()}


def stacked(rows: list[Row]) -> Row:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ---- gradients -------------------------------------------------------------------------------------------------------


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """All of them in one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def of_one_call(model: torch.nn.Module, batch: dict[str, Any], items: Any = None) -> tuple[Tensor, float]:
    """The gradient of one batch, and its loss."""
    model.zero_grad()
    loss = model(**batch, **({} if items is None else {"num_items_in_batch": items})).loss
    loss.backward()
    return flat(collect(model)), loss.item()


def of_accumulation(model: llmengine.Transformer, rows: list[Row]) -> Tensor:
    """llmengine's own: row by row, divided by the counts of all."""
    items = {"tokens": 0, "sequences": 0}
    for row in rows:
        for name, x in row.items():
            if name == "labels" and x.dim() and not x.is_floating_point():
                items["tokens"] += int(((x[1:] if model.config.token_task == "clm" else x) != -100).sum())
            elif name in ("labels", "next_sentence_label"):
                items["sequences"] += int(x.is_floating_point() or x != -100)
            elif name == "start_positions":
                items["sequences"] += int(x < LONGEST)
    model.zero_grad()
    for row in rows:
        model(**stacked([row]), num_items_in_batch=items).loss.backward()
    return flat(collect(model))


def difference(ours: Tensor, other: Tensor) -> float:
    """The largest, relative to the largest element of the other; NaN where either has one."""
    return ((ours - other).abs().max() / other.abs().max()).item()


# ---- measures --------------------------------------------------------------------------------------------------------


def measured(name: str, kind: str) -> dict[str, Any]:
    """One class: Hugging Face's under Trainer, ours, and ours under Trainer."""
    head = HEADS[kind]
    fields = {"num_labels": LABELS} if kind in ("class", "tagging", *PROBLEMS) else {}
    if kind in PROBLEMS:
        fields["problem_type"] = PROBLEMS[kind]
    if name == "ModernBertForMaskedLM":
        fields["reference_compile"] = False
    # RoBERTa's positions are counted from its padding
    padding = {} if name.startswith("Roberta") else {"pad_token_id": 0}
    theirs = hf_model(name, **quiet(name), **padding, **fields).train()
    with tempfile.TemporaryDirectory() as scratch:
        theirs.save_pretrained(scratch)
        ours = llmengine.Transformer.from_pretrained(scratch, classifier_dropout=0.0).train()
    by = {"hugging_face": (theirs, True), "llmengine_trainer": (ours, True), "llmengine": (ours, False)}
    result: dict[str, Any] = {"class": name, "labels": kind}
    for who, (model, in_trainer) in by.items():
        result[who] = splits(model, theirs, head, in_trainer)
    for who, model in (("hugging_face", theirs), ("llmengine", ours)):
        result[who] |= layouts(model, theirs, head)
    return result


def splits(model: torch.nn.Module, theirs: torch.nn.Module, head: Head, in_trainer: bool) -> dict[str, Any]:
    """The mean loss of one batch, in one call, beside eight micro-batches."""

    def both(rows: list[Row]) -> tuple[Tensor, Tensor]:
        rows = [named(model, head, row) for row in padded(theirs, rows, "right")]
        whole, _ = of_one_call(model, stacked(rows))
        return whole, flat(of_trainer(model, rows)) if in_trainer else of_accumulation(model, rows)

    whole, cut = both(rows_of(theirs, head, ragged=False))
    ratio = (cut.norm() / whole.norm()).item()
    rows = rows_of(theirs, head, ragged=True)
    whole, cut = both(rows)
    found = {"ratio": ratio, "ragged": difference(cut / round(ratio), whole)}
    if head.ignorable:
        whole, cut = both([without_labels(rows[0]), *rows[1:]])
        found["one_row_without_labels"] = difference(cut / round(ratio), whole)
    return found


def layouts(model: torch.nn.Module, theirs: torch.nn.Module, head: Head) -> dict[str, Any]:
    """Padding on the left beside padding on the right, packed beside padded (ours), and a batch without any label."""

    def batch(rows: list[Row], side: str) -> Row:
        return stacked([named(model, head, row) for row in padded(theirs, rows, side)])

    rows = rows_of(theirs, head, ragged=True)
    right, left = (of_one_call(model, batch(rows, side))[0] for side in ("right", "left"))
    found: dict[str, Any] = {"left_padding": difference(left, right)}
    if isinstance(model, llmengine.Transformer):
        unpadded = packed(model, [named(model, head, row) for row in rows])
        found["packed"] = difference(of_one_call(model, unpadded)[0], right)
    if head.ignorable:
        gradient, loss = of_one_call(model, batch([without_labels(row) for row in rows], "right"))
        found["no_labels"] = {"loss": loss, "gradient": gradient.abs().max().item()}
    return found


def packed(model: llmengine.Transformer, rows: list[Row]) -> dict[str, Any]:
    """Rows one after another, without padding."""
    per_token, others = [], []
    for row in rows:
        row = {name: x for name, x in row.items() if name != "attention_mask"}
        if model.config.architecture == "encoder_decoder":
            row |= decoder_input(model, row)
        inside = {name: x for name, x in row.items() if x.dim() and x.dtype == torch.int64}
        several = inside["input_ids"].dim() == 2
        per_token += [{n: x[i] for n, x in inside.items()} for i in range(2)] if several else [inside]
        others.append({name: x for name, x in row.items() if name not in inside})
    return pack(per_token) | stacked(others)


def decoder_input(model: llmengine.Transformer, row: Row) -> Row:
    """What the model makes of a target, or of a classifier's source, where it is not given."""
    from llmengine.models.inputs import shift_right

    target = row["labels"] if "labels" in row and row["labels"].dim() else row["input_ids"]
    return {"decoder_input_ids": shift_right(target[None], model.config)[0]}


def quiet(name: str) -> dict[str, float]:
    """No dropout, whatever a family calls it."""
    for prefix, fields in {
        "GPT2": ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "classifier_dropout"),
        "T5": ("dropout_rate", "classifier_dropout"),
        "Bart": ("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"),
        "XLNet": ("dropout", "summary_last_dropout"),
        "Llama": ("attention_dropout",),
        "ModernBert": ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"),
        "Albert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    }.items():
        if name.startswith(prefix):
            return dict.fromkeys(fields, 0.0)
    return dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0)


# ---- report ----------------------------------------------------------------------------------------------------------


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    rows = []
    for name, kind in [*CLASSES.items(), *VARIANTS]:
        rows.append(measured(name, kind))
        print(json.dumps(rows[-1]), flush=True)
    versions = {
        "transformers": transformers.__version__, "torch": torch.__version__, "llmengine": llmengine.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    result = {"versions": versions, "rows": rows}
    text = json.dumps(plain(result), indent=1, allow_nan=False)
    (ROOT / "benchmarks" / "results" / "exactness.json").write_text(text + "\n")
    page = ROOT / "docs" / "exactness.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + "\n".join(tables(result)) + "\n" + END + rest.partition(END)[2])


def plain(value: Any) -> Any:
    """As JSON has it, which has no word for NaN."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def tables(result: dict[str, Any]) -> list[str]:
    """Markdown: accumulation, and then layouts."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"Measured with {versions}.", "",
        "| class | labels | HF in Trainer: factor | ragged | a row without labels | ours in Trainer: factor | ragged "
        "| a row without labels | ours: factor | ragged | a row without labels |", "|" + "---|" * 11,
    ]  # fmt: skip
    for row in result["rows"]:
        cells = [row["class"], row["labels"]]
        for who in ("hugging_face", "llmengine_trainer", "llmengine"):
            found = row[who]
            cells += [f"{found['ratio']:.3f}", _error(found, "ragged"), _error(found, "one_row_without_labels")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "", "| class | labels | HF, no label at all: loss / gradient | left padding | ours, no label at all "
        "| left padding | packed |", "|" + "---|" * 7,
    ]  # fmt: skip
    for row in result["rows"]:
        theirs, ours = row["hugging_face"], row["llmengine"]
        cells = [row["class"], row["labels"], _nothing(theirs), _error(theirs, "left_padding")]
        cells += [_nothing(ours), _error(ours, "left_padding"), _error(ours, "packed")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _error(found: dict[str, Any], name: str) -> str:
    """A relative difference; what float32 rounds away is 0."""
    if name not in found:
        return "-"
    return "NaN" if math.isnan(found[name]) else "0" if found[name] < 3e-6 else f"{found[name]:.2g}"


def _nothing(found: dict[str, Any]) -> str:
    if "no_labels" not in found:
        return "-"
    return f"{found['no_labels']['loss']:.3g} / {found['no_labels']['gradient']:.3g}"


if __name__ == "__main__":
    main()
