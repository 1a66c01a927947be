"""A fine-tuning run that was stopped, in whatever way, and resumed ends as one that was not: bit by bit."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from llmengine.files import sha256
from llmengine.training import checkpoint as checkpoints
from llmengine.training import train
from llmengine.training.finetuning import Finetuning
from tests.training.finetunes import held_out_losses, preferring, pretrained, tiny
from tests.training.runs import At, Crash, crash, interrupt, outcome, run

EVERYTHING = ("r_drop=0.5", "fgm=0.3", "neftune=5", "ema={decay: 0.9}", "optimizer.layer_decay=0.8",
              "fields={dropout: 0.2, embed_dropout: 0.2, layer_dropout: 0.2}")  # fmt: skip
KINDS = {
    "every regulariser": EVERYTHING,
    "adapters": ("lora={r: 2, dropout: 0.1}", "r_drop=0.5", "ema={decay: 0.9}", "optimizer.lr=0.05"),
    "bf16": ("precision=bf16", "neftune=5", "select=loss"),
}


def left(output) -> dict:
    """What must be equal: records, the last checkpoint, the best weights, the model."""
    directories = [*checkpoints.paths(output / "best"), output / "model"]
    return {**outcome(output), **{path.name: sha256(path / "model.safetensors") for path in directories}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_crashed_and_an_interrupted_run_end_as_an_uninterrupted_one(tmp_path, kind):
    config = tiny(tmp_path, *KINDS[kind])
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Crash):
        run(config, tmp_path / "parts", 5, crash)  # the checkpoint is of step 3, an evaluation of step 4
    assert run(config, tmp_path / "parts", 4, interrupt, resume=True).interrupted == "SIGINT"
    torch.manual_seed(12345)  # the caller's generator has no part in it
    result = run(config, tmp_path / "parts", resume=True)
    assert (result.step, result.interrupted, result.best) == (8, None, whole.best)
    assert left(tmp_path / "parts") == left(tmp_path / "whole")


def test_early_stopping_is_resumed(tmp_path):
    """A learning rate that ruins the model: the first evaluation stays the best, and three are waited for."""
    config = tiny(tmp_path, *EVERYTHING, "optimizer.lr=5.0", "schedule.warmup=0", "patience=2", "every.evaluate=1",
                  "select=loss", "steps=20")  # fmt: skip
    watcher = At()
    whole = train(config, tmp_path / "whole", observers=[watcher])
    assert whole.step < 20 and whole.interrupted is None
    assert f"step {whole.step} is the last: 2 evaluations were no better" in watcher.notices
    assert whole.best.step <= whole.step - 2
    with pytest.raises(Crash):
        run(config, tmp_path / "parts", whole.step, crash)
    run(config, tmp_path / "parts", resume=True)
    assert left(tmp_path / "parts") == left(tmp_path / "whole")
    again = run(config, tmp_path / "whole", resume=True)  # what is over stays so
    assert (again.step, again.best) == (whole.step, whole.best)


def test_distillation_is_resumed(tmp_path):
    teacher = run(tiny(tmp_path, "seed=5", "steps=2"), tmp_path / "teacher").output
    config = tiny(tmp_path, f"teacher={teacher}", "r_drop=0.5")
    run(config, tmp_path / "whole")
    with pytest.raises(Crash):
        run(config, tmp_path / "parts", 5, crash)
    run(config, tmp_path / "parts", resume=True)
    assert left(tmp_path / "parts") == left(tmp_path / "whole")
    records = outcome(tmp_path / "whole")["records"]
    assert set(records[0]["losses"]) == {"classification", "distillation", "r_drop"}
    assert set(next(r for r in records if r["kind"] == "evaluation")["losses"]) == {"classification"}


@pytest.mark.parametrize(
    "overrides",
    [(), ("options={loss: ipo, reference: precomputed}",), ("lora={r: 2}", "options={reference: precomputed}")],
    ids=["live", "precomputed", "adapters"],
)
def test_preferences_are_resumed_with_their_reference(tmp_path, overrides):
    """Which is what the run began with, not what the checkpoint holds: losses, margins and the test say so."""
    config = preferring(tmp_path, "fields={dropout: 0.2}", *overrides)
    run(config, tmp_path / "whole")
    with pytest.raises(Crash):
        run(config, tmp_path / "parts", 5, crash)
    run(config, tmp_path / "parts", resume=True)
    assert left(tmp_path / "parts") == left(tmp_path / "whole")
    reports = [(tmp_path / name / "evaluation" / "predictions.jsonl").read_text() for name in ("parts", "whole")]
    assert reports[0] == reports[1]
    pretrained(tmp_path / "gpt", "gpt-tiny", seed=2, objectives=["clm"])
    with pytest.raises(ValueError, match=r"weights that it builds on.* are no longer those"):
        run(config, tmp_path / "parts", resume=True)


def test_regularisers_change_what_is_learnt(tmp_path):
    """That the comparisons above can tell runs apart."""
    weights = []
    for i, overrides in enumerate([(), *((override,) for override in EVERYTHING)]):
        run(tiny(tmp_path, "steps=2", "validation=0", *overrides), tmp_path / str(i))
        weights.append(load_file(tmp_path / str(i) / "model" / "model.safetensors"))
    assert all(any(not torch.equal(each[n], weights[0][n]) for n in each) for each in weights[1:])


# ---- what a run builds on --------------------------------------------------------------------------------------------


def test_the_best_weights_stay_as_long_as_a_checkpoint_may_need_them(tmp_path, monkeypatch):
    """The best of step 2 is exceeded at step 4, but the newest checkpoint, of step 3, knows that of step 2 alone."""
    held_out_losses(monkeypatch, 0.9, 0.8)  # steps 2 and 4
    config = tiny(tmp_path, "select=loss")
    with pytest.raises(Crash):
        run(config, tmp_path / "run", 5, crash)
    assert [path.name for path in checkpoints.paths(tmp_path / "run" / "best")] == ["step-000002", "step-000004"]
    held_out_losses(monkeypatch, 0.8)  # step 4 again
    result = run(config, tmp_path / "run", 4, interrupt, resume=True)
    assert result.best.step == 4
    held_out_losses(monkeypatch, 0.85, 0.9)  # steps 6 and 8
    result = run(config, tmp_path / "run", resume=True)
    assert [path.name for path in checkpoints.paths(tmp_path / "run" / "best")] == ["step-000004"]
    assert result.best.step == 4


def test_best_weights_that_are_gone_or_damaged_are_named(tmp_path):
    config = tiny(tmp_path, "steps=4")
    run(config, tmp_path / "run")
    (best,) = checkpoints.paths(tmp_path / "run" / "best")[-1:]
    with (best / "model.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"spoilt")
    with pytest.raises(checkpoints.Unreadable, match=r"model\.safetensors is damaged"):
        run(config, tmp_path / "run", resume=True)
    shutil.rmtree(best)
    with pytest.raises(checkpoints.Unreadable, match=r"state\.json is missing"):
        run(config, tmp_path / "run", resume=True)


def test_other_rows_or_another_base_are_refused(tmp_path):
    for i, overrides in enumerate([(), ("lora={r: 2}",)]):
        run(tiny(tmp_path, "steps=1", *overrides), tmp_path / str(i))
    pretrained(tmp_path / "base", seed=2)
    run(tiny(tmp_path, "steps=1"), tmp_path / "0", resume=True)  # its weights are all in the checkpoint
    with pytest.raises(ValueError, match=r"weights that it builds on.* are no longer those"):
        run(tiny(tmp_path, "steps=1", "lora={r: 2}"), tmp_path / "1", resume=True)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "more", "label": "good"}) + "\n")
    with pytest.raises(ValueError, match=r"the rows .* are no longer those"):
        run(tiny(tmp_path, "steps=1"), tmp_path / "0", resume=True)
    with pytest.raises(ValueError, match=r"r_drop is 1\.0, was 0\.0"):
        run(tiny(tmp_path, "steps=1", "r_drop=1.0"), tmp_path / "0", resume=True)


def test_a_signal_while_it_evaluates_is_saved_like_any_other(tmp_path, monkeypatch):
    config, evaluate = tiny(tmp_path), Finetuning.evaluate

    def interrupted(run):
        signal.raise_signal(signal.SIGINT)
        return evaluate(run)

    monkeypatch.setattr(Finetuning, "evaluate", interrupted)
    result = train(config, tmp_path / "run")
    assert (result.interrupted, result.step) == ("SIGINT", 2)
    assert result.checkpoint is not None and checkpoints.step_of(result.checkpoint) == 2
