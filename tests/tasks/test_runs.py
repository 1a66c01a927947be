"""Each task that reads texts as a fine-tuning run, from a pretrained model of another kind to a model that answers."""

from __future__ import annotations

import json

import pytest

from llmengine import Transformer, TransformerConfig
from llmengine.data import Tokenizer
from llmengine.tasks import load
from llmengine.training import FinetuneConfig, train

from . import test_choice, test_classification, test_qa, test_tagging

SHAPE = {"n_layers": 1, "d_model": 16, "d_ff": 32, "n_heads": 2}
MODELS = {"bert": ("bert-tiny", ["mlm", "nsp"]), "gpt2": ("gpt-tiny", ["clm"]), "bart": ("bart-base", ["seq2seq"])}
RUNS = {
    "classification": ({}, test_classification.PAIRS),
    "tagging": ({"stride": 2}, test_tagging.ROWS),
    "qa": ({"unanswerable": True, "max_question_tokens": 12}, test_qa.ROWS[:2] + test_qa.NONE),
    "choice": ({}, test_choice.ROWS),
}
LAYOUT = {"gpt2": ("choice",), "bart": ("tagging", "choice")}  # tasks that the family's own layout has no name for


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("task", RUNS)
def test_a_run(task, family, novels, tmp_path):
    options, rows = RUNS[task]
    preset, objectives = MODELS[family]
    kind = {"kind": "wordpiece"} if family == "bert" else {"kind": "bpe", "family": family}
    tokenizer = Tokenizer.train([novels[0][:20_000]], vocab_size=600, **kind)
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
    special |= {"decoder_start_token_id": tokenizer.eos_id, "n_decoder_layers": 1} if family == "bart" else {}
    shape = {"vocab_size": tokenizer.vocab_size, "objectives": objectives, **SHAPE, **special}
    if task in LAYOUT.get(family, ()):
        shape["family"] = "custom"
    Transformer(TransformerConfig.preset(preset, **shape)).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FinetuneConfig.from_dict({
        "task": task, "model": str(tmp_path / "base"), "train": str(data), "validation": str(data), "options": options,
        "steps": 3, "max_length": 40, "data": {"batch_tokens": 400, "workers": 1}, "every": {"evaluate": 3},
    })  # fmt: skip
    result = train(config, tmp_path / "run")
    assert result.evaluation is not None and result.evaluation["losses"].keys() == {task}
    model, again = Transformer.from_pretrained(tmp_path / "run" / "model"), load(tmp_path / "run" / "model", tokenizer)
    assert again.name == task and len(list(again.answers(model, rows))) == len(rows)
