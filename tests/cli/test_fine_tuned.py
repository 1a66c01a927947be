"""From rows to answers by the program alone: finetune, evaluate, predict, generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmengine import Transformer, tasks
from llmengine.data import Tokenizer
from tests.cli.conftest import call, succeed
from tests.tasks.letters import letter_tokenizer, words_of_letters
from tests.training.finetunes import pretrained, rows, write

SHAPE = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "max_positions": 64}
ROLES = "user assistant"  # words of the tokenizer
TALK = """\
{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}\
{% if m['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"""


def test_a_classifier_from_rows_to_answers(tmp_path: Path):
    pretrained(tmp_path / "base")
    train, test = (write(tmp_path / f"{name}.jsonl", rows(*of)) for name, of in {"a": (120, 1), "b": (50, 2)}.items())
    run = tmp_path / "run"
    flags = ("--task", "classification", "--model", tmp_path / "base", "--train", train, "--test", test, "--epochs", 12)
    changes = ("max_length=16", "data.batch_tokens=64", "optimizer.lr=0.005", "every.evaluate=1000")
    printed = succeed("finetune", *flags, "--output", run, *(word for each in changes for word in ("--set", each)))
    judged = succeed("evaluate", run)
    scores = [line for line in judged.splitlines() if "95 % interval" in line]
    assert [line.split()[0] for line in scores] == ["accuracy", "macro_f1", "weighted_f1", "mcc"]
    assert all(line.strip() in printed for line in scores), "the run's own test"
    assert float(scores[0].split()[1]) >= 0.9, "one of six words tells the class"
    found = succeed("predict", run, "-t", "the soup was lovely", "-t", "the soup was awful", "--json")
    assert [json.loads(line)["label"] for line in found.splitlines()] == ["good", "bad"]
    result = call("generate", run, "--prompt", "the soup")
    assert result.exit_code == 2 and "was fine-tuned for classification, which writes no texts" in result.stderr


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder", "chat"])
def writer(request, tmp_path_factory) -> Path:
    """A new model that has seen a few words, and what they are backwards."""
    folder, chat = tmp_path_factory.mktemp(request.param), request.param == "chat"
    letter_tokenizer("$A </s>", f"= {ROLES}").save(folder / "tokenizer")
    pairs = [(word, " ".join(reversed(word.split()))) for word in words_of_letters(40, 5)]
    names = ("prompt", "response") if chat else ("source", "target")
    data = write(folder / "rows.jsonl", [dict(zip(names, pair, strict=True)) for pair in pairs])
    architecture = "decoder" if chat else request.param
    model = {**SHAPE, "architecture": architecture, "tokenizer": str(folder / "tokenizer"), "init_std": 0.3}
    if architecture == "encoder_decoder":
        model["decoder_start_token_id"] = 0
    config = {
        "task": "chat" if chat else "seq2seq", "model": model, "train": str(data), "validation": 0.25, "steps": 3,
        "max_length": 24, "options": {"template": TALK} if chat else {"architecture": architecture, "separator": "="},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    succeed("finetune", folder / "config.yaml", "--output", folder / "run")
    return folder / "run"


def answered(run: Path, prompt: str, **options) -> str:
    task = tasks.load(run / "model", Tokenizer.load(run / "model"))
    task = tasks.make(task.name, task.tokenizer, [], max_length=task.max_length, **{**vars(task.options), **options})
    row = {"messages": [{"role": "user", "content": prompt}]} if task.name == "chat" else {"source": prompt}
    return next(iter(task.answers(Transformer.from_pretrained(run / "model").eval(), [row])))["text"]


def test_writers_are_judged_and_asked(writer):
    judged = json.loads(succeed("evaluate", writer, "--json"))
    assert judged["main"] == "chrf" and judged["rows"] == 10 and {"bleu", "exact_match"} <= judged["scores"].keys()
    assert ("perplexity" in judged["scores"]) == (judged["facts"]["task"] == "chat")
    assert "## Texts farthest from the reference" in (writer / "evaluation" / "report.md").read_text(encoding="utf-8")
    assert succeed("predict", writer, "--text", "a b c") == answered(writer, "a b c") + "\n"


def test_generate_asks_in_the_tasks_own_way(writer):
    likeliest = answered(writer, "a b c")
    assert succeed("generate", writer, "-p", "a b c") == likeliest + "\n"
    assert succeed("generate", writer, "-p", "a b c", "--greedy") == likeliest + "\n"
    assert succeed("generate", writer, "-p", "a b c", "--beams", 3) == answered(writer, "a b c", beams=3) + "\n"
    short = succeed("generate", writer, "-p", "a b c", "--new-tokens", 2).split()
    assert short == likeliest.split()[:2]


def test_generate_draws_where_it_is_asked_to(writer):
    printed = succeed("generate", writer, "-p", "a b c", "--samples", 4, "--seed", 3, "--temperature", 1.5)
    assert len(set(printed.strip("\n").split("\n\n---\n\n"))) > 1
    assert succeed("generate", writer, "-p", "a b c", "--samples", 4, "--seed", 3, "--temperature", 1.5) == printed
    drawn = answered(writer, "a b c", temperature=0.8, top_p=0.95, seed=5)
    assert succeed("generate", writer, "-p", "a b c", "--seed", 5) == drawn + "\n"
    result = call("generate", writer, "-p", "a", "--greedy", "--seed", 1)
    assert result.exit_code == 2 and "--seed is for texts that are drawn" in result.stderr
