"""`llmengine finetune`: flags, a config file, the run folder, its resumption."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from llmengine import Transformer
from llmengine.cli import finetune
from llmengine.training import FinetuneConfig
from tests.cli.conftest import call, succeed
from tests.training.finetunes import pretrained, rows, write

FAST = ("--set", "optimizer.lr=0.01", "--set", "data.batch_tokens=64", "--set", "max_length=16")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("tuned")
    base, train = pretrained(folder / "base"), write(folder / "train.jsonl", rows(80))
    test, run = write(folder / "test.jsonl", rows(20, seed=5)), folder / "run"
    printed = succeed("finetune", "--task", "classification", "--model", base, "--train", train, "--test", test,
                      "--epochs", 2, *FAST, "-o", run)  # fmt: skip
    return SimpleNamespace(folder=folder, run=run, printed=printed)


def test_leaves_a_run_folder(tuned):
    assert sorted(p.name for p in tuned.run.iterdir() if not p.name.startswith(".")) == [
        "best", "checkpoints", "config.yaml", "evaluation", "loss.png", "metrics.jsonl", "model",
    ]  # fmt: skip
    assert (tuned.run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    config = yaml.safe_load((tuned.run / "config.yaml").read_text())
    assert (config["task"], config["epochs"], config["optimizer"]["lr"]) == ("classification", 2.0, 0.01)
    assert Transformer.from_pretrained(tuned.run / "model").config.labels == ("bad", "good")


def test_says_at_the_end_what_came_out_and_what_to_do_next(tuned):
    records = [json.loads(line) for line in (tuned.run / "metrics.jsonl").read_text().splitlines()]
    best = [r for r in records if r["kind"] == "evaluation" and r["best"]][-1]
    value = best["scores"]["accuracy"]
    assert f"best      accuracy {value:.4f} on held-out rows at step {best['step']}" in tuned.printed
    assert f"held out  loss {best['loss']:.3f}" in tuned.printed
    score = json.loads((tuned.run / "evaluation" / "scores.json").read_text())["scores"]["accuracy"]["value"]
    assert any(line.split()[:3] == ["test", "accuracy", f"{score:.4f}"] for line in tuned.printed.splitlines())
    for command in ("predict", "evaluate"):
        assert f"llmengine {command} {tuned.run}" in tuned.printed


def test_what_it_proposes_works(tuned):
    answers = succeed("predict", tuned.run, "--text", "the soup was lovely")
    assert "good" in answers and "bad" in answers
    assert "accuracy" in succeed("evaluate", tuned.run)


def test_a_fine_tuned_model_has_no_words_to_fill_in(tuned):
    result = call("fill", tuned.run, "the soup was [MASK]")
    assert result.exit_code == 2 and "mlm" in result.stderr and "task is not a field" not in result.stderr


def test_a_finished_run_resumes_to_its_end(tuned):
    before = (tuned.run / "model" / "model.safetensors").read_bytes()
    assert "on held-out rows at step" in succeed("finetune", "--resume", tuned.run)
    assert (tuned.run / "model" / "model.safetensors").read_bytes() == before


def test_a_config_file_and_its_name(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {
        "task": "classification",
        "model": str(tuned.folder / "base"),
        "train": [str(tuned.folder / "train.jsonl")],
    }
    Path("mood.yaml").write_text(yaml.safe_dump({**fields, "steps": 1, "lora": {"r": 2}}))
    printed = succeed("finetune", "mood.yaml", *FAST)
    assert "runs/mood" in printed and "adapter/" in printed
    assert (tmp_path / "runs" / "mood" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--task", "classification"], "finetune needs a config file, or flags: --model, --train are missing"),
        (["--task", "clasification", "--model", "x", "--train", "y"], "did you mean classification?"),
        (["--resume", "{run}", "-o", "elsewhere"], "goes on with that folder's own config.yaml: leave out --output"),
        (["--resume", "{run}", "--epochs", "9"], "epochs is 9.0, was 2.0"),
        (["--resume", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_errors_are_sentences(tuned, arguments, sentence):
    result = call("finetune", *(a.format(run=tuned.run) for a in arguments))
    assert result.exit_code == 2 and sentence in " ".join(result.stderr.split()), result.output


def test_each_kind_of_run_is_resumed_by_its_own_command(tuned):
    result = call("train", "--resume", tuned.run)
    assert result.exit_code == 2 and "is a run of llmengine finetune" in result.stderr


# ---- files of other formats ------------------------------------------------------------------------------------------


def test_parallel_files_are_sources_and_their_targets(tmp_path):
    sources = [row["text"] for row in rows(30)]
    for name, texts in (("a.en", sources), ("a.de", map(str.upper, sources))):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in texts))
    base = pretrained(tmp_path / "base", "bart-tiny", objectives=["seq2seq"])
    en, de, run = tmp_path / "a.en", tmp_path / "a.de", tmp_path / "a run"
    printed = succeed("finetune", "--task", "seq2seq", "--model", base, "--train", en, "--train", de,
                      "--kind", "parallel", "--set", "steps=1", *FAST, "-o", run)  # fmt: skip
    assert f"llmengine predict '{run}' --text" in printed, "quoted for the shell"
    assert len(succeed("predict", run, "--data", en, "--json").splitlines()) == 30, "sources need no targets"
    assert "on 30 rows" in succeed("evaluate", run, "--data", en, "--data", de)
    alone = call("evaluate", run, "--data", en)
    assert alone.exit_code == 2 and '"parallel" takes two files' in alone.stderr


def test_a_format_and_names_of_columns_are_the_run_s(tmp_path):
    text = "".join(f"{w} x B-{t} x\n{w} x I-{t} x\n\n" for w, t in [("soup", "A"), ("day", "B")] * 10)
    (tmp_path / "a.txt").write_text(text)
    run, file = tmp_path / "run", tmp_path / "a.txt"
    base = pretrained(tmp_path / "base")
    succeed("finetune", "--task", "tagging", "--model", base, "--train", file, "--kind", "conll", "--column", "words=0",
            "--column", "tags=2", "--set", "steps=1", *FAST, "-o", run)  # fmt: skip
    assert "on 20 rows" in succeed("evaluate", run, "--data", file)
    assert json.loads(succeed("predict", run, "--data", file, "--json").splitlines()[0])["tags"]
    wrong = call("evaluate", run, "--data", file, "--format", "delimiter=;")
    assert wrong.exit_code == 2 and "'conll' has no option delimiter; options: scheme, comments" in wrong.stderr


@pytest.mark.parametrize(
    "field, sentence",
    [
        ("format.kind=conl", "format: kind 'conl' is not one of jsonl, json, csv"),
        ("format.kind=[a]", "format: kind ['a'] is not one of jsonl, json, csv"),
        ("format={kind: csv, scheme: bio}", "format: kind 'csv' has no option scheme; options: delimiter"),
        ("format.delimter=x", "format: delimter is not one of kind, comments, delimiter"),
    ],
)
def test_a_format_that_there_is_not_is_told(field, sentence):
    result = call("finetune", "--task", "tagging", "--model", "m", "--train", "a.csv", "--set", field)
    assert result.exit_code == 2 and sentence in result.stderr


def test_what_it_proposes_asks_all_that_the_task_asks():
    def question(task: str) -> str:
        fields = {"task": task, "model": "m", "train": ["a b.jsonl"]}
        return finetune._question(FinetuneConfig.from_dict(fields))

    assert question("classification") == question("chat") == '--text "…"'
    assert question("qa") == '--text "…" --pair "…"'
    assert question("choice") == question("preference") == "--data 'a b.jsonl'"


def test_a_model_that_is_not_there_is_told(tmp_path):
    train = write(tmp_path / "a.jsonl", rows(20))
    for command in (("predict", tmp_path / "no", "--text", "a"), ("evaluate", tmp_path / "no", "--data", train),
                    ("finetune", "--task", "classification", "--model", tmp_path / "no", "--train", train,
                     "-o", tmp_path / "run")):  # fmt: skip
        result = call(*command)
        assert result.exit_code == 2 and f"{tmp_path / 'no'} does not exist; give a" in result.stderr


def test_a_report_that_cannot_be_written_is_told_by_its_path(tuned):
    file = tuned.folder / "test.jsonl"
    result = call("evaluate", tuned.run, "--output", file / "report")
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {file}") and "Errno" not in result.stderr
