"""The files that a judgement leaves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from llmengine import metrics
from llmengine.metrics import Confusion
from llmengine.training import confusion, report
from llmengine.training.markdown import excerpt, number
from llmengine.training.mistakes import mistakes

LABELS = ("good", "bad", "so|so")
ROWS = [
    {"text": "it was\ngood", "label": "good"},
    {"text": "it was *not* | good", "label": "bad"},
    {"text": "x" * 500, "label": "bad"},
    {"text": "neither", "label": "so|so"},
]


def answer(label: str, sure: float) -> dict:
    rest = (1 - sure) / 2
    return {"label": label, "scores": {each: sure if each == label else rest for each in LABELS}}


ANSWERS = [answer("good", 0.9), answer("good", 0.6), answer("good", 0.8), answer("so|so", 0.5)]


@pytest.fixture
def judgement():
    return metrics.classification([row["label"] for row in ROWS], [each["label"] for each in ANSWERS], LABELS)


def written(folder: Path, judgement, rows=ROWS, answers=ANSWERS, **options) -> str:
    facts = {"task": "classification", "data": ["test_a.csv", "test_b.csv"]}
    report.write(folder, judgement, rows, answers, asked=("text", "text_pair"), facts=facts, **options)
    return (folder / "report.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)[1]


def test_report_has_scores_tables_and_settings(tmp_path, judgement):
    text = written(tmp_path / "new" / "folder", judgement, settings={"steps": 7, "optimizer": {"lr": 1e-5}})
    score = judgement.scores["accuracy"]
    assert text.startswith("# accuracy 0.5000 on 4 rows\n")
    assert f"| **accuracy** | 0.5000 | {score.low:.4f} to {score.high:.4f} |" in section(text, "Scores")
    assert "| macro_f1 | 0.5000 |" in section(text, "Scores")
    assert "| bad | 0.0000 | 0.0000 | 0.0000 | 2 |" in section(text, "Classes")
    assert r"| so\|so | 1.0000 | 1.0000 | 1.0000 | 1 |" in section(text, "Classes")
    assert "| bad | good | 2 | 2 |" in section(text, "Confusions") and "(confusion.png)" in text
    assert "| data | test\\_a.csv test\\_b.csv |" in text
    assert section(text, "Settings") == "~~~~yaml\nsteps: 7\noptimizer:\n  lr: 1.0e-05\n~~~~\n"


def test_mistakes_are_told_the_surest_first_and_do_not_break_the_table(tmp_path, judgement):
    told = section(written(tmp_path, judgement), "Most confident mistakes")
    assert told.startswith("2 of 2.")
    lines = [line for line in told.splitlines() if line.startswith("|")]
    assert lines[0] == "| row | probability | text | right | predicted |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 3", "| 2"]
    assert lines[2] == f"| 3 | 0.8000 | {'x' * 239}… | bad | good |"
    assert lines[3] == r"| 2 | 0.6000 | it was \*not\* \| good | bad | good |"


def test_scores_json_holds_all_of_the_judgement(tmp_path, judgement):
    written(tmp_path, judgement)
    found = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert (found["rows"], found["main"], found["lower_is_better"]) == (4, "accuracy", False)
    for name, score in judgement.scores.items():
        assert found["scores"][name] == {"value": score.value, "low": score.low, "high": score.high}
    assert found["confusion"] == {"labels": list(LABELS), "counts": [[1, 0, 0], [2, 0, 0], [0, 0, 1]]}
    assert found["tables"][0]["rows"][1] == ["bad", 0.0, 0.0, 0.0, 2]
    assert found["facts"]["data"] == ["test_a.csv", "test_b.csv"]


def test_predictions_are_the_rows_and_their_answers(tmp_path, judgement):
    written(tmp_path, judgement)
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {**row, "prediction": each} for row, each in zip(ROWS, ANSWERS, strict=True)
    ]


def test_a_report_without_classes_removes_the_picture_of_an_earlier_one(tmp_path, judgement):
    written(tmp_path, judgement)
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    rows, answers = [{"text": "a", "label": 3.0}], [{"value": 3.5}]
    text = written(tmp_path, metrics.regression([3.0], [3.5]), rows, answers)
    assert not (tmp_path / "confusion.png").exists() and "confusion" not in text
    assert "| 1 | 0.5000 | a | 3 | 3.5 |" in section(text, "Largest errors")


def test_what_is_unknown_is_a_dash_and_null(tmp_path):
    text = written(tmp_path, metrics.classification([], [], LABELS), [], [])
    assert "| **accuracy** | - | - to - |" in text and "nan" not in text.lower()
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["scores"]["accuracy"] == {"value": None, "low": None, "high": None}
    assert (tmp_path / "predictions.jsonl").read_text() == ""


def test_no_mistake_is_said(tmp_path):
    right = [answer(row["label"], 0.9) for row in ROWS]
    gold = [row["label"] for row in ROWS]
    assert "There is no mistake." in written(tmp_path, metrics.classification(gold, gold, LABELS), ROWS, right)


def test_the_same_report_is_the_same_bytes(tmp_path, judgement):
    for folder in ("a", "b"):
        written(tmp_path / folder, judgement)
    for file in ("report.md", "scores.json", "predictions.jsonl", "confusion.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 4


# ---- mistakes --------------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello you"}]}
UNANSWERED = {"messages": CHAT["messages"][:1]}
QUESTION = {"question": "q", "context": "c", "answers": {"text": ["The Rhine"], "answer_start": [0]}}


@pytest.mark.parametrize(
    ("rows", "answers", "title", "expected"),
    [
        (
            [{"label": ["a"]}, {"label": ["a", "b"]}, {"label": []}],
            [
                {"labels": ["a"], "scores": {"a": 0.7, "b": 0.1}},
                {"labels": ["a"], "scores": {"a": 0.9, "b": 0.3}},
                {"labels": ["b"], "scores": {"a": 0.1, "b": 0.8}},
            ],
            "Most confident mistakes",
            [(2, "", "b", 0.8), (1, "a, b", "a", 0.7)],
        ),
        (
            [{"label": 1}, {"label": "1"}, {"label": 7}],
            [
                {"label": "1", "scores": {"1": 0.9, "2": 0.1}},
                {"label": "2", "scores": {"1": 0.4, "2": 0.6}},
                {"label": "1", "scores": {"1": 0.9, "2": 0.1}},
            ],
            "Most confident mistakes",
            [(2, "7", "1", 0.9), (1, "1", "2", 0.6)],
        ),
        (
            [{"label": [1, 2.5]}, {"label": [1, 2]}, {"label": [0, 2]}],
            [{"value": [1.0, 2.0]}, {"value": [1.0, 2.0]}, {"value": [3.0, 3.0]}],
            "Largest errors",
            [(2, "0, 2", "3, 3", 2.0), (0, "1, 2.5", "1, 2", 0.25)],
        ),
        (
            [{"words": ["Ann", "ran"], "tags": ["B-PER", "O"]}] * 2,
            [{"tags": ["B-PER", "B-LOC"]}, {"tags": ["O", "B-PER"]}],
            "Sentences with most mistakes",
            [(1, "Ann/B-PER ran/O", "Ann/O ran/B-PER", 2), (0, "ran/O", "ran/B-LOC", 1)],
        ),
        (
            [QUESTION, QUESTION, {**QUESTION, "answers": {"text": [], "answer_start": []}}],
            [{"answer": "rhine", "score": 0.9}, {"answer": "", "score": 0.2}, {"answer": "Po", "score": 0.5}],
            "Most confident mistakes",
            [(2, "(no answer)", "Po", 0.5), (1, "The Rhine", "(no answer)", 0.2)],
        ),
        (
            [{"choices": ["x", "y"], "label": 0}, {"choices": ["x", "y"], "label": 1}],
            [{"choice": 1, "scores": [0.4, 0.6]}, {"choice": 1, "scores": [0.4, 0.6]}],
            "Most confident mistakes",
            [(0, "x", "y", 0.6)],
        ),
        (
            [{"source": "s", "target": "one two"}, CHAT, {"prompt": "p", "response": "r"}, UNANSWERED, {"prompt": "p"}],
            [{"text": "one  two"}, {"text": "hello yon"}, {"text": "s"}, {"text": "t"}, {"text": "t"}],
            "Texts farthest from the reference",
            [(2, "r", "s", 0.0), (1, "hello you", "hello yon", pytest.approx(74, abs=8))],
        ),
        (
            [{"chosen": "c", "rejected": "r"}] * 3,
            [{"margin": -0.5, "chosen": False}, {"margin": 1.0, "chosen": True}, {"margin": -2.0, "chosen": False}],
            "Most confident mistakes",
            [(2, "c", "r", -2.0), (0, "c", "r", -0.5)],
        ),
    ],
)
def test_each_kind_of_answer_has_its_mistakes(rows, answers, title, expected):
    kind, found = mistakes(rows, answers)
    assert kind.title == title
    assert [(each.row, each.right, each.given, each.measure) for each in found] == expected


def test_an_answer_of_no_task_is_named():
    with pytest.raises(ValueError, match=r"an answer has one of label, labels, .*; got \{sentiment\}"):
        mistakes([{}], [{"sentiment": 1}])


# ---- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3, "3"), (1234567, "1,234,567"), (0.5, "0.5000"), (2.5e7, "2.5e+07"), (math.nan, "-"), (-0.25, "-0.2500")],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_excerpts_are_one_line_without_mark_up():
    assert excerpt("a\n\tb\x00 `c`", 20) == "a b\N{REPLACEMENT CHARACTER} \\`c\\`"
    assert excerpt("one two three", 8) == "one two…"


@pytest.mark.parametrize("labels", [("a", "$x$"), ("正面", "负面"), ("\U0001f600", "x" * 99)])
def test_any_label_can_be_drawn(tmp_path, recwarn, labels):
    confusion.draw(Confusion(labels, np.array([[3, 1], [0, 0]])), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and not recwarn.list


@pytest.mark.parametrize("classes", [1, 21, 61, 300])
def test_any_number_of_classes_can_be_drawn(tmp_path, classes):
    labels = tuple(f"class {i}" for i in range(classes))
    confusion.draw(Confusion(labels, np.eye(classes, dtype=np.int64)), tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
