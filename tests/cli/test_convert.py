"""`convert` and `verify`: what comes out of one goes into the other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmengine import Transformer, TransformerConfig
from tests.cli.conftest import call, succeed
from tests.models.translators import Fairseq

SMALL = {"vocab_size": 61, "n_layers": 3, "n_heads": 2, "d_model": 16, "d_ff": 24, "max_positions": 20}


def made(directory: Path, preset: str, **fields) -> Transformer:
    torch.manual_seed(0)
    has_limit = TransformerConfig.preset(preset).max_positions is not None
    shape = SMALL | fields if has_limit else SMALL | fields | {"max_positions": None}
    model = Transformer(TransformerConfig.preset(preset, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model


def scale(directory: Path, name: str, by: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = tensors[name] * by
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def family_in(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text())
    return config["model_type"]


# ---- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["bert-tiny", "gpt-tiny", "bart-tiny", "llama-tiny"])
def test_there_and_back(preset, tmp_path):
    """Hugging Face's layout -> ours -> theirs: every tensor and the config as they were."""
    made(tmp_path / "a", preset)
    theirs = family_in(tmp_path / "a")
    printed = succeed("convert", tmp_path / "a", tmp_path / "b", "--family", "custom")
    count = sum(p.numel() for p in Transformer.from_pretrained(tmp_path / "a").parameters())
    assert f": {theirs}, " in printed and f"{count:,} parameters, float32" in printed
    assert "llmengine's own layout" in printed and family_in(tmp_path / "b") == "llmengine"
    succeed("convert", tmp_path / "b", tmp_path / "c", "--family", theirs)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    first, last = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ac")
    assert first == last


def test_convert_takes_a_run_with_its_tokenizer(runs, tmp_path):
    printed = succeed("convert", runs["clm"].path, tmp_path / "model", "--dtype", "bfloat16")
    assert "heads clm" in printed and "bfloat16" in printed and "with tokenizer.json" in printed
    texts = [
        succeed("generate", directory, "--prompt", "It was", "--greedy", "--new-tokens", 3)
        for directory in (runs["clm"].path, tmp_path / "model")
    ]
    assert all(text.startswith("It was") for text in texts)
    assert {p.dtype for p in Transformer.from_pretrained(tmp_path / "model").parameters()} == {torch.bfloat16}


def test_convert_takes_a_file_of_fairseq(tmp_path):
    theirs = Fairseq()
    torch.save({"args": theirs.options(), "model": theirs.state()}, tmp_path / "model.pt")
    printed = succeed("convert", tmp_path / "model.pt", tmp_path / "ours")
    assert "custom, encoder_decoder" in printed and "heads seq2seq" in printed and "tokenizer" not in printed
    assert "The same within 0." in succeed("verify", tmp_path / "model.pt", tmp_path / "ours", "--tolerance", 0)
    result = call("convert", tmp_path / "model.pt", tmp_path / "theirs", "--family", "bart")
    assert result.exit_code == 2 and 'family "bart" cannot express' in result.stderr
    assert not (tmp_path / "theirs").exists()


def test_convert_replaces_only_by_force(tmp_path):
    made(tmp_path / "a", "bert-tiny")
    made(tmp_path / "b", "gpt-tiny")
    before = (tmp_path / "b" / "model.safetensors").read_bytes()
    result = call("convert", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2 and "--force" in result.stderr
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == before
    succeed("convert", tmp_path / "a", tmp_path / "b", "--force")
    assert family_in(tmp_path / "b") == "bert"
    succeed("convert", tmp_path / "b", tmp_path / "b", "--family", "custom", "--force")  # in place
    succeed("verify", tmp_path / "a", tmp_path / "b")


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["bert-tiny", "gpt-tiny", "bart-tiny", "xlnet-tiny"])
def test_verify_finds_no_difference_between_layouts(preset, tmp_path):
    made(tmp_path / "a", preset)
    succeed("convert", tmp_path / "a", tmp_path / "b", "--family", "custom")
    printed = succeed("verify", tmp_path / "a", tmp_path / "b", "--tolerance", 0)
    assert "The same within 0." in printed and re.search(r"^logits +0.0e\+00", printed, flags=re.M)
    assert printed.count(".layers.") == (6 if preset == "bart-tiny" else 3)


@pytest.mark.parametrize(
    "name, where",
    [
        ("encoder.layers.1.feed_forward.up.weight", "encoder.layers.1"),
        ("encoder.embeddings.position.weight", "encoder.embeddings"),
        ("decoder.layers.2.cross_attention.q.weight", "decoder.layers.2"),
        ("token_head.bias", "logits"),
    ],
)
def test_verify_names_the_first_layer_that_diverges(name, where, tmp_path):
    made(tmp_path / "a", "bart-tiny", family="custom")
    made(tmp_path / "b", "bart-tiny", family="custom")
    scale(tmp_path / "b", name, by=1.5)
    result = call("verify", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 1, result.output
    assert f"They diverge from {where} on" in result.stdout
    first = next(line for line in result.stdout.splitlines() if line.endswith("<"))
    assert first.startswith(where)
    assert call("verify", tmp_path / "a", tmp_path / "b", "--tolerance", 1e6).exit_code == 0


def test_nothing_is_as_far_as_nan(tmp_path):
    for name in "ab":
        made(tmp_path / name, "gpt-tiny", family="custom")
    scale(tmp_path / "b", "decoder.layers.1.attention.out.bias", by=float("nan"))
    result = call("verify", tmp_path / "a", tmp_path / "b", "--tolerance", 1e9)
    assert result.exit_code == 1 and "diverge from decoder.layers.1 on" in result.stdout


def test_verify_on_a_text(runs, tmp_path):
    run = runs["bert"].path
    printed = succeed("verify", run, run / "model", "--text", "She was happy.")
    assert "tokens of the text" in printed and "nsp logits" in printed and "pooler" in printed
    made(tmp_path / "a", "gpt-tiny")
    result = call("verify", tmp_path / "a", tmp_path / "a", "--text", "so")
    assert result.exit_code == 2 and "has a tokenizer's files" in result.stderr


def test_verify_tells_what_only_one_has(tmp_path):
    made(tmp_path / "a", "bert-tiny")
    made(tmp_path / "b", "bert-tiny", objectives=["mlm"], pooler="none")
    assert "not compared, as only one has them: nsp" in call("verify", tmp_path / "a", tmp_path / "b").stdout
    made(tmp_path / "c", "bert-tiny", n_layers=2)
    result = call("verify", tmp_path / "a", tmp_path / "c")
    assert result.exit_code == 2 and "n_layers is 3 in the first model and 2 in the second" in result.stderr


def test_verify_takes_any_tokenizer_for_a_text(tmp_path):
    config = TransformerConfig.preset("bert-tiny", vocab_size=8)
    for name in ("a", "b"):
        torch.manual_seed(0)
        Transformer(config).save_pretrained(tmp_path / name)
    without = call("verify", tmp_path / "a", tmp_path / "b", "--text", "the soup")
    assert without.exit_code == 2 and "has a tokenizer's files" in without.stderr
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "soup"]
    (tmp_path / "b" / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    assert "2 tokens of the text" in succeed("verify", tmp_path / "a", tmp_path / "b", "--text", "the soup")
