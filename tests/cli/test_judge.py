"""`evaluate` and `predict` of a fine-tuned model's directory, with a task that needs no training."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from llmengine.cli import fine_tuned
from llmengine.cli.predict import describe
from llmengine.data import Tokenizer
from llmengine.tasks import TASKS
from tests.cli import lengths
from tests.cli.conftest import call, succeed

ROWS = [
    {"text": "a text of some length", "label": "long"},
    {"text": "short", "label": "short"},
    {"text": "tiny", "label": "long"},
    {"text": "it is not that short", "label": "short"},
]


@pytest.fixture
def model(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's directory with its task."""
    monkeypatch.setitem(TASKS, "lengths", "Lengths")
    monkeypatch.setitem(sys.modules, "llmengine.tasks.lengths", lengths)
    directory = tmp_path / "model"
    shutil.copytree(runs["bert"].path / "model", directory)
    lengths.Lengths(Tokenizer.load(directory), 32, ("long", "short"), lengths.Options()).save(directory)
    return directory


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_prints_scores_with_intervals_and_writes_the_report(model, tmp_path):
    data = lines(tmp_path / "test.jsonl", ROWS)
    printed = succeed("evaluate", model, "--data", data, "--output", tmp_path / "report")
    assert printed.startswith("accuracy        0.5000   95 % interval 0.0000 to 1.0000\nmacro_f1 ")
    assert f"on 4 rows of test.jsonl, weights of {model}" in printed
    assert f"report  {tmp_path / 'report' / 'report.md'}" in printed
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text, "a report does not tell where this machine keeps things"
    assert "| data | test.jsonl |" in text and "| task | lengths |" in text and "| model | model (bert, " in text
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md", "scores.json", "predictions.jsonl", "confusion.png",
    }  # fmt: skip


def test_evaluate_prints_json(model, tmp_path):
    data = lines(tmp_path / "test.jsonl", ROWS)
    found = json.loads(succeed("evaluate", model, "--data", data, "--data", data, "--json"))
    assert found["scores"]["accuracy"]["value"] == 0.5 and found["main"] == "accuracy" and found["rows"] == 8
    assert found["confusion"]["counts"] == [[2, 2], [2, 2]]
    assert found["facts"]["data"] == ["test.jsonl", "test.jsonl"]
    assert not (model / "evaluation").exists(), "a model's directory is left as it was"


def test_evaluate_renames_columns_and_takes_any_kind(model, tmp_path):
    (tmp_path / "test.tsv").write_text("class\tsentence\nlong\tIt is a long one.\nshort\tNo.\n", encoding="utf-8")
    names = ("--column", "text=sentence", "--column", "label=class")
    found = json.loads(succeed("evaluate", model, "--data", tmp_path / "test.tsv", *names, "--json"))
    assert found["scores"]["accuracy"]["value"] == 1.0
    shutil.move(tmp_path / "test.tsv", tmp_path / "test.table")
    again = succeed("evaluate", model, "--data", tmp_path / "test.table", "--kind", "tsv", *names, "--json")
    assert json.loads(again)["scores"] == found["scores"]


# ---- predict ---------------------------------------------------------------------------------------------------------


def test_predict_answers_a_text(model):
    printed = succeed("predict", model, "--text", "a text of thirty characters…")
    assert [line.split() for line in printed.splitlines()] == [["*", "73.7", "%", "long"], ["26.3", "%", "short"]]
    answer = json.loads(succeed("predict", model, "--text", "abc", "--pair", "defghijkl", "--json"))
    assert answer["scores"]["long"] == pytest.approx(12 / 22)


def test_predict_answers_rows_without_labels(model, tmp_path):
    data = lines(tmp_path / "rows.jsonl", [{"text": row["text"], "id": i} for i, row in enumerate(ROWS)])
    answers = [json.loads(line) for line in succeed("predict", model, "--data", data).splitlines()]
    assert [answer["label"] for answer in answers] == ["long", "short", "short", "long"]
    output = tmp_path / "new" / "predictions.jsonl"
    assert "4 predictions" in succeed("predict", model, "--data", data, "--output", output)
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row.pop("prediction") for row in written] == answers
    assert written == [{"text": row["text"], "id": i} for i, row in enumerate(ROWS)]


def test_predict_reads_lines_of_text(model, tmp_path):
    (tmp_path / "lines.txt").write_text("no\nbut this is long\n", encoding="utf-8")
    answers = succeed("predict", model, "--data", tmp_path / "lines.txt").splitlines()
    assert [json.loads(answer)["label"] for answer in answers] == ["short", "long"]


@pytest.mark.parametrize(
    ("asked", "pair", "row"),
    [
        (("text", "text_pair"), None, {"text": "a b"}),
        (("words",), None, {"words": ["a", "b"]}),
        (("question", "context"), "c", {"question": "a b", "context": "c"}),
        (("source",), None, {"source": "a b"}),
        (("messages",), None, {"messages": [{"role": "user", "content": "a b"}]}),
    ],
)
def test_a_text_becomes_the_question_of_each_task(monkeypatch, asked, pair, row):
    monkeypatch.setattr(lengths.Lengths, "asked", asked)
    assert fine_tuned.question(lengths.Lengths(None, 32, (), None), "a b", pair) == row


@pytest.mark.parametrize(
    ("asked", "pair", "message"),
    [
        (("question", "context"), None, "also asks for context; give --pair, the context"),
        (("question", "choices"), None, "also asks for choices; give rows: --data FILE"),
        (("source",), "b", "--pair: task 'lengths' asks for source alone"),
    ],
)
def test_a_text_that_is_no_whole_question_is_an_error(monkeypatch, asked, pair, message):
    monkeypatch.setattr(lengths.Lengths, "asked", asked)
    with pytest.raises(ValueError, match=message):
        fine_tuned.question(lengths.Lengths(None, 32, (), None), "a", pair)


@pytest.mark.parametrize(
    ("row", "answer", "expected"),
    [
        ({}, {"text": "Guten Tag"}, ["Guten Tag"]),
        ({}, {"value": 2.5}, ["2.5"]),
        ({"words": ["Ann", "is"]}, {"tags": ["B-PER", "O"]}, ["Ann  B-PER", "is   O"]),
        ({}, {"labels": ["b"], "scores": {"a": 0.2, "b": 0.7}}, ["*  70.0 %  b", "   20.0 %  a"]),
        ({}, {"answer": "", "score": 0.25}, ["(no answer)  (0.250)"]),
        ({}, {"choice": 1, "scores": [0.4, 0.6]}, ['{"choice": 1, "scores": [0.4, 0.6]}']),
    ],
)
def test_answers_are_told(row, answer, expected):
    assert list(describe(row, answer)) == expected


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{model}"], 'give what is to be answered: --text "…", or --data FILE'),
        (["predict", "{model}", "--text", "a", "--data", "b"], "(not both)"),
        (["predict", "{model}", "--data", "b", "--pair", "a"], "--pair belongs to a --text"),
        (["predict", "{plain}", "--text", "a"], "it is no fine-tuned model"),
        (["predict", "{model}", "--data", "none.jsonl"], "none.jsonl does not exist"),
        (["evaluate", "{model}"], "is a model directory and knows no rows; give them: --data FILE"),
        (["evaluate", "{model}", "--corpus", "a"], "--corpus: a fine-tuned model is judged on rows"),
        (["evaluate", "{model}", "--column", "a=b"], "--column: goes with --data"),
        (["evaluate", "{model}", "--data", "{data}", "--column", "text"], "write NAME=THEIRS, as text=sentence"),
        (["evaluate", "{model}", "--data", "{data}"], "row 1 has no 'label'"),
        (["evaluate", "{plain}", "--data", "{data}"], "--data: only for fine-tuned models"),
    ],
)
def test_errors_say_what_to_do(runs, model, tmp_path, arguments, message):
    data = lines(tmp_path / "rows.jsonl", [{"text": "a"}])
    paths = {"model": model, "plain": runs["bert"].path, "data": data}
    result = call(*(argument.format(**paths) for argument in arguments))
    assert result.exit_code == 2 and message in result.stderr, result.output
