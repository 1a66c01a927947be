"""What is wrong with a row is told with the place where the row was read, however far from there it is found."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from llmengine.data import read_rows
from llmengine.data.pairs import read_pairs
from llmengine.data.rows import PlacedRow
from llmengine.tasks import make
from llmengine.training.finetune_data import split

ANSWERS = {"text": ["she"], "answer_start": [0]}
GOOD = {
    "classification": {"text": "she said", "label": "a"},
    "tagging": {"words": ["she", "said"], "tags": ["a", "b"]},
    "qa": {"question": "who", "context": "she said", "answers": ANSWERS},
    "choice": {"question": "who", "choices": ["she", "it"], "label": 0},
    "seq2seq": {"source": "she", "target": "said"},
    "chat": {"prompt": "who", "response": "she"},
    "preference": {"prompt": "who", "chosen": "she", "rejected": "it"},
}
BAD = {
    "classification": [{"label": "c"}, {"label": 1.5}, {"label": None}, {"text": 3}],
    "tagging": [{"tags": ["a", "c"]}, {"tags": ["a"]}, {"tags": "a b"}, {"words": 3}],
    "qa": [{"answers": "she"}, {"answers": {"text": "she"}}, {"answers": {**ANSWERS, "answer_start": [4]}}],
    "choice": [{"label": 2}, {"choices": []}, {"choices": "she"}, {"question": 3}],
    "seq2seq": [{"target": 3}, {"source": 3}],
    "chat": [{"response": 3}, {"messages": [{"role": "assistant", "content": "a"}]}, {"messages": [{}]}],
    "preference": [{"chosen": 3}, {"prompt": [{"role": "user"}]}],
}
MISSING = {task: next(reversed(row)) for task, row in GOOD.items() if task != "chat"}
LABELS = {"classification": ["a", "b"], "tagging": ["a", "b"]}


def read(path, task: str, wrong: dict) -> list[PlacedRow]:
    """A good row, a blank line, and a bad row in line 3."""
    lines = [json.dumps(GOOD[task]), "", json.dumps({k: v for k, v in (GOOD[task] | wrong).items() if v is not ...})]
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_rows(path)


@pytest.mark.parametrize(
    ("task", "wrong"),
    [(task, wrong) for task, each in BAD.items() for wrong in each]
    + [(task, {column: ...}) for task, column in MISSING.items()],
)
def test_examples_name_file_and_line(wordpiece, tmp_path, task, wrong):
    path = tmp_path / "rows.jsonl"
    made = make(task, wordpiece, [], labels=LABELS.get(task, []), max_length=64)
    rows = read(path, task, wrong)
    assert len(made.examples(rows[:1]))
    with pytest.raises(ValueError, match=f"task '{task}': {path}, line 3[: ]"):
        made.examples(rows)


@pytest.mark.parametrize("task", LABELS)
def test_classes_and_judgements_name_it_too(wordpiece, tmp_path, task):
    path = tmp_path / "rows.jsonl"
    rows = read(path, task, BAD[task][1])
    with pytest.raises(ValueError, match=f"{path}, line 3: "):
        make(task, wordpiece, read(path, task, {MISSING[task]: 1.5}), max_length=64)
    made = make(task, wordpiece, [], labels=["a", "b"], max_length=64)
    with pytest.raises(ValueError, match=f"{path}, line 3: "):
        made.judge(rows, [{"label": "a", "tags": ["a", "b"]}] * 2)


def test_rows_know_their_place_wherever_they_go(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("review,stars\n" + "".join(f"text {i},{i}\n" for i in range(9)), encoding="utf-8")
    rows = read_rows(path, columns={"text": "review"})
    assert rows[3] == {"text": "text 3", "stars": "3"} and rows[3].place == f"{path}, line 5"
    for again in (pickle.loads(pickle.dumps(rows[3])), copy.copy(rows[3]), copy.deepcopy(rows[3])):
        assert again == rows[3] and again.place == rows[3].place
    _, held_out = split(rows, 0.3, seed=0)
    assert [row.place for row in held_out] == [f"{path}, line {int(row['stars']) + 2}" for row in held_out]
    (tmp_path / "a.jsonl").write_text('{"source": "a", "target": "b"}\n\n{"source": "a", "target": 1}\n')
    with pytest.raises(ValueError, match=r"corpus: .*a\.jsonl, line 3: target is 1; expected a text"):
        read_pairs(tmp_path / "a.jsonl")


def test_rows_of_no_file_have_numbers(wordpiece):
    made = make("seq2seq", wordpiece, [], max_length=64)
    with pytest.raises(ValueError, match="row 2 has no 'target'; its columns: source"):
        made.examples([GOOD["seq2seq"], {"source": "a"}])
