"""`evaluate` and `predict` of a fine-tuned model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmengine import Transformer, tasks
from llmengine.cli import fine_tuned
from llmengine.cli.predict import describe
from llmengine.data import Tokenizer
from llmengine.training import train
from tests.cli.conftest import call, succeed
from tests.training.finetunes import preferring, rows, tiny, write

TEST = rows(40, seed=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of sentences, hardly trained, that was tested when it was."""
    folder = tmp_path_factory.mktemp("sentences")
    test = write(folder / "test.jsonl", TEST)
    train(tiny(folder, "task=classification", f"test={test}"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def answers(run: Path) -> list[dict]:
    """Its answers to TEST."""
    task = tasks.load(run / "model", Tokenizer.load(run / "model"))
    return list(task.answers(Transformer.from_pretrained(run / "model").eval(), TEST))


def near(answer: dict) -> dict:
    """A batch of others rounds differently."""
    return {**answer, "scores": pytest.approx(answer["scores"], abs=1e-5)}


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_repeats_the_runs_test_and_writes_the_report(run, answers):
    folder = run / "evaluation"
    tested = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert tested.keys() == {"report.md", "scores.json", "predictions.jsonl", "confusion.png"}
    score = json.loads(tested["scores.json"])["scores"]["accuracy"]
    shutil.rmtree(folder)
    assert 0.1 < score["value"] < 1, "nor is all wrong or right"
    printed = succeed("evaluate", run)
    interval = f"95 % interval {score['low']:.4f} to {score['high']:.4f}"
    assert printed.startswith(f"accuracy        {score['value']:.4f}   {interval}\nmacro_f1 ")
    assert f"on 40 rows of test.jsonl, weights of {run / 'model'}\n" in printed
    assert printed.endswith(f"report  {folder / 'report.md'}\n")
    for name in ("scores.json", "confusion.png"):
        assert (folder / name).read_bytes() == tested[name]
    written = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert written == [{**row, "prediction": near(answer)} for row, answer in zip(TEST, answers, strict=True)]


def test_the_report_knows_the_run_and_not_the_machine(run):
    succeed("evaluate", run)
    text = (run / "evaluation" / "report.md").read_text(encoding="utf-8")
    assert "| data | test.jsonl |" in text and "| task | classification |" in text and "| model | run |" in text
    assert "| fine-tuned from | base |" in text
    assert "\nmax_length: 16\n" in text and "\nseed: 3\n" in text
    assert str(run.parent) not in text and str(run.parent) not in (run / "evaluation" / "scores.json").read_text()


def test_evaluate_falls_back_to_the_rows_that_were_held_out(tmp_path):
    train(tiny(tmp_path, "task=classification", "every.evaluate=8"), tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "evaluation" and last["step"] == 8
    found = json.loads(succeed("evaluate", tmp_path / "run", "--json"))
    assert {name: score["value"] for name, score in found["scores"].items()} == pytest.approx(last["scores"])
    assert found["rows"] == 12 and found["facts"]["data"] == ["0.2 of train.jsonl, held out"]


def test_evaluate_prints_json(run):
    data = run.parent / "test.jsonl"
    found = json.loads(succeed("evaluate", run / "model", "--data", data, "--data", data, "--json"))
    tested = json.loads((run / "evaluation" / "scores.json").read_text())
    assert found["scores"]["accuracy"]["value"] == tested["scores"]["accuracy"]["value"]
    assert found["main"] == "accuracy" and found["rows"] == 80 and found["confusion"]["labels"] == ["bad", "good"]
    assert found["facts"]["data"] == ["test.jsonl", "test.jsonl"]
    assert not (run / "model" / "evaluation").exists(), "a model's directory is left as it was"


def test_evaluate_renames_columns_and_takes_any_kind(run, answers, tmp_path):
    table = ["class\tsentence", *(f"{row['label']}\t{row['text']}" for row in TEST)]
    (tmp_path / "test.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    names = ("--column", "text=sentence", "--column", "label=class")
    found = json.loads(succeed("evaluate", run, "--data", tmp_path / "test.tsv", *names, "--json"))
    right = [row["label"] == answer["label"] for row, answer in zip(TEST, answers, strict=True)]
    assert found["scores"]["accuracy"]["value"] == sum(right) / 40
    shutil.move(tmp_path / "test.tsv", tmp_path / "test.table")
    again = succeed("evaluate", run, "--data", tmp_path / "test.table", "--kind", "tsv", *names, "--json")
    assert json.loads(again)["scores"] == found["scores"]
    own = run / "evaluation-test"
    assert (own / "report.md").is_file(), "the report on other rows does not replace that on the run's own"
    shutil.rmtree(own)
    printed = succeed("evaluate", run, "--data", run.parent / "test.jsonl", "--output", tmp_path / "report")
    assert f"report  {tmp_path / 'report' / 'report.md'}" in printed and not own.exists()


# ---- predict ---------------------------------------------------------------------------------------------------------


def test_predict_answers_a_text(run, answers):
    scores = sorted(answers[0]["scores"].items(), key=lambda item: -item[1])
    expected = [f"{mark} {100 * p:5.1f} %  {label}" for mark, (label, p) in zip("* ", scores, strict=True)]
    assert succeed("predict", run, "--text", TEST[0]["text"]).splitlines() == expected
    printed = succeed("predict", run / "model", "-t", TEST[0]["text"], "-t", TEST[1]["text"], "--json")
    assert [json.loads(line) for line in printed.splitlines()] == [*map(near, answers[:2])]


def test_predict_reads_a_second_text(run):
    alone, other, pair = (
        json.loads(succeed("predict", run, "--text", "the day was", "--json", *more))
        for more in ((), ("--pair", "dull"), ("--pair", "fine"))
    )
    assert alone["scores"] != other["scores"] != pair["scores"]


def test_predict_answers_rows_without_labels(run, answers, tmp_path):
    unlabelled = [{"text": row["text"], "id": i} for i, row in enumerate(TEST)]
    data = write(tmp_path / "rows.jsonl", unlabelled)
    printed = succeed("predict", run, "--data", data, "--batch-tokens", 64)
    assert [json.loads(line) for line in printed.splitlines()] == [*map(near, answers)]
    output = tmp_path / "new" / "predictions.jsonl"
    assert "40 predictions" in succeed("predict", run, "--data", data, "--output", output)
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row.pop("prediction") for row in written] == [*map(near, answers)] and written == unlabelled


def test_predict_knows_what_the_runs_files_call_the_question(tmp_path):
    """The label has another name too, but these rows have none."""
    train_rows = [{"sentence": row["text"], "class": row["label"]} for row in rows(60)]
    config = tiny(tmp_path, "task=classification", "columns={text: sentence, label: class}", "steps=1")
    write(tmp_path / "train.jsonl", train_rows)
    train(config, tmp_path / "run")
    data = write(tmp_path / "rows.jsonl", [{"sentence": row["text"]} for row in TEST])
    assert len(succeed("predict", tmp_path / "run", "--data", data).splitlines()) == 40


def test_predict_reads_lines_of_text(run, answers, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(row["text"] for row in TEST), encoding="utf-8")
    printed = succeed("predict", run, "--data", tmp_path / "lines.txt")
    assert [json.loads(line) for line in printed.splitlines()] == [*map(near, answers)]


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
def test_a_text_becomes_the_question_of_each_task(asked, pair, row):
    assert fine_tuned.question(SimpleNamespace(name="toy", asked=asked), "a b", pair) == row


@pytest.mark.parametrize(
    ("asked", "pair", "message"),
    [
        (("question", "context"), None, "also asks for context; give --pair, the context"),
        (("question", "choices"), None, "also asks for choices; give rows: --data FILE"),
        (("source",), "b", "--pair: task 'toy' asks for source alone"),
    ],
)
def test_a_text_that_is_no_whole_question_is_an_error(asked, pair, message):
    with pytest.raises(ValueError, match=message):
        fine_tuned.question(SimpleNamespace(name="toy", asked=asked), "a", pair)


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


# ---- preferences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), ("lora={r: 2}",), ("options={reference: precomputed}",)])
def test_a_run_of_preferences_is_judged_beside_the_model_that_it_began_with(tmp_path, overrides):
    """As when it was trained; the model alone knows nothing of that, and says so."""
    train(preferring(tmp_path, *overrides), tmp_path / "run")
    scores = tmp_path / "run" / "evaluation" / "scores.json"
    tested = json.loads(scores.read_text())["scores"]
    again = json.loads(succeed("evaluate", tmp_path / "run", "--json"))["scores"]
    assert abs(tested["margin"]["value"]) > 1e-4, "it learnt something"
    for name, score in tested.items():
        assert again[name] == pytest.approx(score, rel=1e-3, abs=1e-6)
    result = call("evaluate", tmp_path / "run" / "model", "--data", tmp_path / "test.jsonl", "--json")
    assert "is not at hand (a run's folder knows it, its model alone does not)" in result.stderr
    alone = json.loads(result.stdout)["scores"]["margin"]["value"]
    assert alone != pytest.approx(tested["margin"]["value"], rel=1e-3, abs=1e-6)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{run}/model"], 'give what is to be answered: --text "…", or --data FILE'),
        (["predict", "{run}/model", "--text", "a", "--data", "b"], "(not both)"),
        (["predict", "{run}/model", "--data", "b", "--pair", "a"], "--pair belongs to a --text"),
        (["predict", "{plain}", "--text", "a"], "it is no fine-tuned model"),
        (["predict", "{run}/model", "--data", "none.jsonl"], "none.jsonl does not exist"),
        (["evaluate", "{run}/model"], "is a model directory and knows no rows; give them: --data FILE"),
        (["evaluate", "{run}/model", "--corpus", "a"], "--corpus: a fine-tuned model is judged on rows"),
        (["evaluate", "{run}", "--column", "a=b"], "--column: goes with --data"),
        (["evaluate", "{run}/model", "--data", "{data}", "--column", "text"], "write NAME=THEIRS, as text=sentence"),
        (["evaluate", "{run}/model", "--data", "{data}"], "rows.jsonl, line 1 has no 'label'"),
        (["evaluate", "{plain}", "--data", "{data}"], "--data: only for fine-tuned models"),
    ],
)
def test_errors_say_what_to_do(runs, run, tmp_path, arguments, message):
    data = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    paths = {"run": run, "plain": runs["bert"].path, "data": data}
    result = call(*(argument.format(**paths) for argument in arguments))
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_a_run_without_weights_is_an_error(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model" / "config.json").unlink()
    result = call("predict", tmp_path / "run", "--text", "a")
    assert result.exit_code == 2 and "neither finished nor interrupted" in result.stderr


def test_a_run_that_held_out_nothing_wants_rows(tmp_path):
    train(tiny(tmp_path, "task=classification", "validation=0", "steps=1"), tmp_path / "run")
    result = call("evaluate", tmp_path / "run")
    assert result.exit_code == 2 and "held out nothing (validation: 0); give rows: --data FILE" in result.stderr
