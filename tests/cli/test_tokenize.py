"""`llmengine tokenize`: a corpus on disk that `train`, `inspect` and `evaluate` take."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml

from llmengine.data import Tokenizer, open_shards, read_documents
from tests.cli.conftest import MODEL, call, succeed
from tests.objectives.conftest import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A directory with a byte-level BPE and a WordPiece vocabulary."""
    directory = tmp_path_factory.mktemp("tokenizers")
    texts = [novel[:20_000] for novel in read_documents("austen")]
    for kind in ("bpe", "wordpiece"):
        Tokenizer.train(texts, kind, 400).save(directory / kind)
    return directory


@pytest.mark.parametrize(("objective", "kind", "flags"), [("clm", "bpe", []), ("bert", "wordpiece", ["--sentences"])])
def test_train_takes_what_it_wrote(corpus, tokenizers, tmp_path, objective, kind, flags):
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    tokenize = ["tokenize", corpus, "--tokenizer", tokenizers / kind, "--output", tokens, *flags]
    printed = succeed(*tokenize, "--documents", "paragraph")
    shards = open_shards(tokens)
    assert f"{len(shards):,} documents" in printed and f"{len(shards.tokens.ids):,} tokens of uint16" in printed
    assert f"llmengine train --corpus {tokens} --objective {objective}" in printed
    assert ("sentences" in printed) == bool(flags)
    small = [f"model.{name}={value}" for name, value in MODEL.items()]
    small += [
        "data.sequence_length=32",
        "data.batch_tokens=128",
        "data.held_out=0.2",
        "schedule.kind=constant",
        "every.save=2",
    ]
    sets = [argument for each in small for argument in ("--set", each)]
    preset = {"clm": "gpt-tiny", "bert": "bert-tiny"}[objective]
    arguments = ["--corpus", tokens, "--objective", objective, "--preset", preset, "--steps", 4, *sets]
    succeed("train", *arguments, "--output", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["tokenizer"] == {"path": str(tokens / "tokenizer")}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["loss"] for record in records if record["kind"] == "evaluation"]
    evaluated = json.loads(succeed("evaluate", run, "--json"))
    assert evaluated["loss"] == pytest.approx(held_out[-1], rel=1e-5)
    inspected = succeed("inspect", run, "--sequences", 1)
    train, held = shards.split(0.2, 0)
    assert f"{len(train):,} documents to train on, {len(train.tokens.ids):,} tokens; held out" in inspected
    assert f"held out {len(held.tokens.ids):,} tokens" in inspected
    # the same training, resumed from its middle
    shutil.rmtree(run / "checkpoints" / "step-000004")
    succeed("train", "--resume", run)
    resumed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in resumed] == [(r["step"], r["loss"]) for r in records]
    # and a corpus that is another one now
    shutil.rmtree(run / "checkpoints" / "step-000004")
    succeed(*tokenize, "--force", "--documents", "line")
    result = call("train", "--resume", run)
    assert result.exit_code == 2 and "are no longer those that the run began with" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "corpus: nowhere does not exist"),
        (["CORPUS", "--documents", "page"], "unit must be one of file, paragraph, line, got 'page'"),
        (["CORPUS", "--tokenizer", "nowhere"], "nowhere"),
        (["CORPUS", "--resume", "--force"], "not both"),
    ],
)
def test_what_is_wrong_is_a_sentence(corpus, tokenizers, tmp_path, arguments, message):
    arguments = [corpus if argument == "CORPUS" else argument for argument in arguments]
    result = call("tokenize", "--tokenizer", tokenizers / "bpe", "--output", tmp_path / "tokens", *arguments)
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "tokens" / "index.json").exists()


def test_training_says_what_the_corpus_lacks(corpus, tokenizers, tmp_path):
    tokens = tmp_path / "tokens"
    succeed("tokenize", corpus, "--documents", "line", "--tokenizer", tokenizers / "wordpiece", "--output", tokens)
    train = ["train", "--corpus", tokens, "--output", tmp_path / "run", "--steps", 2]
    result = call(*train, "--objective", "bert")
    assert result.exit_code == 2 and "tokenize again with --sentences" in result.stderr
    result = call(*train, "--objective", "mlm", "--set", "data.options={whole_word: true}")
    assert result.exit_code == 2 and "tokenize again with --words" in result.stderr
    result = call(*train, "--objective", "mlm", "--set", "tokenizer.vocab_size=300")
    assert result.exit_code == 2 and re.search("is tokenised already; leave out tokenizer", result.stderr)
    result = call(*train, "--objective", "mlm", "--set", f"tokenizer.path={tokenizers / 'bpe'}")
    assert result.exit_code == 2
