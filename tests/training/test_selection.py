"""Which weights remain, and when a run has waited long enough."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llmengine.training import checkpoint as checkpoints
from llmengine.training import train
from llmengine.training.selection import Selection
from tests.training.finetunes import held_out_losses, tiny
from tests.training.runs import At, run


def record(step: int, value: float | None, *, loss: float = 1.0, lower: bool = False) -> dict:
    return {"step": step, "loss": loss, "scores": {"f1": value}, "select": "f1", "lower_is_better": lower}


def follow(selection: Selection, *values: float | None, lower: bool = False) -> list[bool]:
    return [selection.seen(record(i + 1, value, lower=lower)) for i, value in enumerate(values)]


def test_the_best_is_the_highest_and_of_equals_the_first(tmp_path):
    selection = Selection(tmp_path)
    assert follow(selection, 0.5, 0.4, 0.5, 0.7, 0.7) == [True, False, False, True, False]
    assert (selection.best.step, selection.best.value, selection.over) == (4, 0.7, False)


def test_of_equal_scores_the_lower_loss_is_better(tmp_path):
    selection = Selection(tmp_path, patience=9)
    assert [selection.seen(record(1, 0.5, loss=0.4)), selection.seen(record(2, 0.5, loss=0.3))] == [True, True]
    assert (selection.best.step, selection.waited) == (2, 1)


def test_lower_may_be_better(tmp_path):
    selection = Selection(tmp_path)
    assert follow(selection, 0.5, 0.6, 0.4, lower=True) == [True, False, True]


def test_patience_counts_what_is_not_better_by_more_than_min_delta(tmp_path):
    selection = Selection(tmp_path, patience=3, min_delta=0.1)
    assert follow(selection, 0.5, 0.58, 0.6) == [True, True, True]  # each is the best, none by more than 0.1
    assert (selection.waited, selection.over) == (2, False)
    assert follow(selection, 0.61) == [True] and selection.waited == 0
    follow(selection, 0.0, 0.7, 0.65)
    assert selection.over and selection.best.value == 0.7


def test_a_score_that_is_not_defined_is_never_the_best(tmp_path):
    selection = Selection(tmp_path, patience=2)
    assert follow(selection, None, float("nan")) == [False, False]
    assert selection.best is None and selection.over and selection.weights() is None


def test_a_selection_goes_on_from_a_checkpoint(tmp_path):
    tensors = {step: {"w": torch.full((2,), float(step))} for step in range(1, 5)}
    selection = Selection(tmp_path, patience=5, min_delta=0.1)
    facts = {}
    for step, value in enumerate([0.5, 0.55, 0.52, 0.9], 1):
        if selection.seen(record(step, value)):
            selection.keep(tensors[step])
        facts[step] = selection.facts()
    again = Selection(tmp_path, patience=5, min_delta=0.1)
    again.restore(facts[3], 3)  # that of step 4 is to come
    assert (again.best.step, again.waited) == (2, 2) and torch.equal(again.weights()["w"], tensors[2]["w"])
    assert [path.name for path in checkpoints.paths(tmp_path)] == ["step-000001", "step-000002"]
    again.prune(oldest=2)
    assert [path.name for path in checkpoints.paths(tmp_path)] == ["step-000002"]
    again.prune(oldest=1)
    assert again.seen(record(4, 0.9)) and again.waited == 0


@pytest.mark.parametrize("options", [(), ("ema={decay: 0.5}",)])
def test_the_model_is_that_of_the_best_evaluation(tmp_path, options, monkeypatch):
    """Not that of the last step."""

    class Watch(At):
        def recorded(self, run, record):
            if record["kind"] == "evaluation" and record["best"]:
                with run.averaged():
                    self.weights = {n: p.detach().clone() for n, p in run.transformer.named_parameters()}

    watch = Watch()
    held_out_losses(monkeypatch, 0.9, 0.5, 0.7, 0.6)
    config = tiny(tmp_path, "select=loss", *options)
    result = train(config, tmp_path / "run", observers=[watch])
    assert (result.best.step, result.best.value, result.step) == (4, 0.5, 8)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(saved["classifier.weight"], watch.weights["heads.classification.out.weight"])
    assert torch.equal(saved["bert.embeddings.word_embeddings.weight"], watch.weights["encoder.embeddings.word.weight"])


def test_without_held_out_rows_the_last_weights_remain(tmp_path):
    result = run(tiny(tmp_path, "validation=0", "steps=2"), tmp_path / "run")
    assert result.best is None and result.evaluation is None
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors")
    assert torch.equal(saved["classifier.weight"], last["heads.classification.out.weight"])


@pytest.mark.parametrize("select, name", [("null", "accuracy"), ("loss", "loss"), ("macro_f1", "macro_f1")])
def test_the_score_that_selects(tmp_path, select, name):
    result = run(tiny(tmp_path, f"select={select}", "steps=2"), tmp_path / "run")
    assert result.best.name == name and result.evaluation["select"] == name


def test_a_score_that_the_task_lacks_is_named_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"select: 'bleu' is not a score .* scores: loss, accuracy, macro_f1"):
        run(tiny(tmp_path, "select=bleu"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
