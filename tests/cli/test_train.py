"""`llmengine train`: the run folder, its resumption, flags in place of a file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import llmengine
from llmengine.data import Tokenizer
from tests.cli.conftest import call, succeed


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["bert", "clm"])
def test_leaves_a_run_folder(runs, objective: str):
    run = runs[objective].path
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == [
        "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "model", "samples.md",
    ]  # fmt: skip
    assert not [p for p in run.rglob("*.png.*")], "temporary files are gone"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [r["step"] for r in records(run) if r["kind"] == "train"] == [1, 2, 3, 4]
    assert [r["step"] for r in records(run) if r["kind"] == "evaluation"] == [2, 4]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"] == objective


@pytest.mark.parametrize("objective", ["bert", "clm"])
def test_says_at_the_end_what_came_out_and_what_to_do_next(runs, objective: str):
    run, printed = runs[objective].path, runs[objective].printed
    evaluation = records(run)[-1]
    assert f"loss {evaluation['loss']:.3f}" in printed
    assert f"perplexity {evaluation['perplexity']:.1f}" in printed
    first = records(run)[0]["loss"]
    assert re.search(rf"loss +{first:.3f} -> \d+\.\d+ in 4 steps", printed)
    assert f"read      {run / 'samples.md'}: what it made of the same texts" in printed
    accuracy = {head: f"{100 * share:.0f} %" for head, share in evaluation.get("accuracy", {}).items()}
    if objective == "bert":
        assert f"          of the hidden tokens it guesses {accuracy['mlm']}\n" in printed
        assert f"          whether one text follows another it tells in {accuracy['nsp']} of the cases" in printed
    else:
        assert f"as unsure of a token as among {evaluation['perplexity']:,.0f} equally probable ones" in printed
    assert f"llmengine evaluate {run}" in printed
    assert ("llmengine generate" in printed) == (objective == "clm")
    assert ("llmengine fill" in printed) == (objective == "bert")


def test_samples_of_an_encoder_are_fillings_and_pairs(runs):
    text = (runs["bert"].path / "samples.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert [s.splitlines()[0] for s in sections] == ["Step 0 of 4 (before training)", "Step 2 of 4", "Step 4 of 4"]
    for section in sections:
        assert section.count("[MASK]") >= 3
        assert re.search(r"\| `\w+` \| (\*\*)?`.+`(\*\*)? \d+ %", section)
        assert "| follows |" in section and "| random |" in section


def test_samples_of_a_decoder_are_continuations(runs):
    text = (runs["clm"].path / "samples.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        prompts = re.findall(r"^\*\*([^*\n]+)\*\* …\n\n~~~~text\n(.+?)\n~~~~", section, flags=re.M | re.S)
        assert len(prompts) == 3
        for prompt, continued in prompts:
            assert continued.startswith(prompt) and len(continued) > len(prompt)


def test_transformers_loads_the_decoder_and_its_tokenizer(runs):
    transformers = pytest.importorskip("transformers")
    directory = runs["clm"].path / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = their_tokenizer("It was a truth, she said.")["input_ids"]
    assert ids == Tokenizer.load(directory).encode("It was a truth, she said.")
    batch = torch.tensor([ids])
    with torch.no_grad():
        ours = llmengine.Transformer.from_pretrained(directory)(batch).logits
        torch.testing.assert_close(ours, theirs(batch).logits, rtol=1e-4, atol=1e-5)


def test_transformers_loads_the_encoder_and_its_tokenizer(runs):
    transformers = pytest.importorskip("transformers")
    directory = runs["bert"].path / "model"
    theirs = transformers.BertForPreTraining.from_pretrained(directory, attn_implementation="eager").eval()
    batch = transformers.AutoTokenizer.from_pretrained(directory)("She was [MASK].", "It was.", return_tensors="pt")
    assert Tokenizer.load(directory).mask_id in batch["input_ids"][0]
    assert batch["token_type_ids"].max() == 1
    with torch.no_grad():
        ours, their = llmengine.Transformer.from_pretrained(directory)(**batch), theirs(**batch)
    torch.testing.assert_close(ours.logits, their.prediction_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.seq_relationship_logits, their.seq_relationship_logits, rtol=1e-4, atol=1e-5)


def test_resuming_goes_on_and_keeps_what_was_written(runs, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(runs["clm"].path, run)
    before = (run / "samples.md").read_text(encoding="utf-8")
    printed = succeed("train", "--resume", run, "--steps", 6)
    assert "steps 5 to 6" in printed and "in 6 steps" in printed
    assert [r["step"] for r in records(run) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    after = (run / "samples.md").read_text(encoding="utf-8")
    assert after.startswith(before) and "## Step 6 of 6" in after


def test_flags_alone_suffice(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    sizes = [f"--set=model.{name}=32" for name in ("d_model", "d_ff")]
    succeed(
        "train", "--corpus", corpus / "0.txt", "--corpus", corpus / "1.txt", "--objective", "clm", "--preset",
        "gpt-tiny", "--steps", 1, *sizes, "--set", "tokenizer.vocab_size=400", "--output", run,
    )  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["corpus"] == [str(corpus / "0.txt"), str(corpus / "1.txt")]
    assert (config["objective"], config["steps"]) == ("clm", 1)
    assert config["model"] == {"preset": "gpt-tiny", "d_model": 32, "d_ff": 32}


def test_output_defaults_to_the_name_of_the_config(configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    succeed("train", configs["clm"], "--steps", 1)
    assert (tmp_path / "runs" / "clm" / "samples.md").exists()


def test_a_config_may_be_toml(configs, corpus: Path, tmp_path: Path):
    toml = tmp_path / "c.toml"
    toml.write_text(
        f'corpus = "{corpus}"\nobjective = "clm"\nsteps = 1\n[tokenizer]\nvocab_size = 400\n'
        '[model]\npreset = "gpt-tiny"\nd_model = 32\nd_ff = 64\n'
    )
    assert "in 1 steps" in succeed("train", toml, "--output", tmp_path / "run")


def test_a_run_that_holds_nothing_out_has_samples_of_training_texts(configs, tmp_path: Path):
    succeed("train", configs["bert"], "--steps", 2, "--set", "data.held_out=0.0", "--output", tmp_path / "run")
    text = (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")
    assert "training texts" in text and "held-out" not in text and "## Step 2 of 2" in text
    result = call("evaluate", tmp_path / "run")
    assert result.exit_code == 2 and "held out nothing" in result.stderr
