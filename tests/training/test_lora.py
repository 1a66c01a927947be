"""Adapters of the package peft in a fine-tuning run."""

from __future__ import annotations

import sys

import peft
import pytest
import torch
from safetensors.torch import load_file

from llmengine import Transformer
from llmengine.data.tokenizer import Tokenizer
from llmengine.training import checkpoint as checkpoints
from llmengine.training.finetuning import Finetuning
from llmengine.training.run import Folder
from tests.training.finetunes import rows, tiny
from tests.training.runs import run

CPU = torch.device("cpu")


def prepared(tmp_path, *overrides: str) -> Finetuning:
    return Finetuning.prepare(tiny(tmp_path, *overrides), Folder(tmp_path / "run"), CPU, print)


def test_adapters_and_the_head_are_trained_and_kept(tmp_path):
    config = tiny(tmp_path, "lora={r: 4, alpha: 8}", "optimizer.lr=0.05")
    run(config, tmp_path / "run")
    base = Transformer.from_pretrained(tmp_path / "base")
    merged = Transformer.from_pretrained(tmp_path / "run" / "model")
    changed = {name for name, p in merged.named_parameters() if name not in dict(base.named_parameters())
               or not torch.equal(p, base.get_parameter(name))}  # fmt: skip
    assert base.pooler is None, "the pooler is as new as the head"
    linear = {n for n, m in merged.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    fresh = {n for n in dict(merged.named_parameters()) if n.startswith(("heads.", "pooler."))}
    assert changed == {f"{name}.weight" for name in linear} | fresh
    last = checkpoints.paths(tmp_path / "run" / "checkpoints")[-1]
    assert all("lora_" in name or "heads" in name or "pooler" in name for name in load_file(last / "model.safetensors"))
    # peft's own reader puts the adapters and the head onto the pretrained model
    options = {"n_labels": 2, "labels": ("bad", "good"), "objectives": ["classification"]}
    again = peft.PeftModel.from_pretrained(Transformer.from_pretrained(tmp_path / "base", **options),
                                           tmp_path / "run" / "adapter").eval()  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path / "run" / "model")
    ids = torch.tensor([tokenizer.encode(rows(1)[0]["text"])])
    torch.testing.assert_close(again(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_targets_are_named(tmp_path):
    model = prepared(tmp_path, "lora={r: 2, targets: [qkv, down]}").transformer
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"qkv", "down"} and len(adapted) == 4
    with pytest.raises(
        ValueError, match=r"lora.targets: this model's layers have no query; they have down, out, qkv, up"
    ):
        prepared(tmp_path, "lora={r: 2, targets: [qkv, query]}")


def test_without_peft_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install peft"):
        prepared(tmp_path, "lora={r: 2}")
