"""The example configs: each trains two steps of its model, and transformers computes the same from the run's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from llmengine import Transformer
from llmengine.training import RunConfig, train
from tests.training.runs import corpus

EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = {
    "bart": "BartForConditionalGeneration", "t5": "T5ForConditionalGeneration", "xlnet": "XLNetLMHeadModel",
    "albert": "AlbertForPreTraining", "bert": "BertForPreTraining", "gpt": "GPT2LMHeadModel",
    "electra": "ElectraForPreTraining",
}  # fmt: skip
NEW = ("bart", "t5", "xlnet", "albert", "electra")


def test_every_example_is_a_run():
    paths = sorted(EXAMPLES.glob("train_*.yaml"))
    assert {path.stem.removeprefix("train_") for path in paths} == set(CLASSES)
    for path in paths:
        RunConfig.from_file(path)


@pytest.mark.parametrize("name", NEW)
def test_transformers_loads_the_model(name, tmp_path):
    config = RunConfig.from_file(
        EXAMPLES / f"train_{name}.yaml",
        [f"corpus={corpus(tmp_path)}", "steps=2", "schedule.warmup=0", "tokenizer.vocab_size=500", "data.held_out=0.1"],
    )
    train(config, tmp_path / "run")
    directory = tmp_path / "run" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    theirs = getattr(transformers, CLASSES[name]).from_pretrained(directory).eval()
    ours = Transformer.from_pretrained(directory)
    ids = torch.tensor([tokenizer("The cat chases a dog.")["input_ids"]])
    batch = {"input_ids": ids, **({"labels": ids} if name in ("bart", "t5") else {})}
    with torch.no_grad():
        expected, got = theirs(**batch), ours(**batch)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.logits, expected[1 if name in ("bart", "t5") else 0], rtol=1e-4, atol=1e-4)


def test_a_run_that_cannot_be_saved_fails_before_it_begins(tmp_path):
    config = RunConfig.from_file(
        EXAMPLES / "train_bert.yaml", [f"corpus={corpus(tmp_path)}", "model.gated=true", "tokenizer.vocab_size=200"]
    )
    with pytest.raises(ValueError, match='family "bert" cannot express gated True'):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
