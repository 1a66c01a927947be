"""A run that was stopped, in whatever way, and resumed ends as one that was not: bit by bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmengine.training import RunConfig, checkpoint, train
from tests.training.runs import At, Crash, crash, interrupt, outcome, run, tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", ["clm", "bert", "plm"])
def test_a_crashed_and_an_interrupted_run_end_as_an_uninterrupted_one(tmp_path, objective, precision, workers):
    config = tiny(tmp_path, objective, f"precision={precision}")
    run(config, tmp_path / "whole")
    config = tiny(tmp_path, objective, f"precision={precision}", f"data.workers={workers}")
    with pytest.raises(Crash):
        run(config, tmp_path / "parts", 5, crash)  # the checkpoint is of step 3
    assert run(config, tmp_path / "parts", 4, interrupt, resume=True).interrupted == "SIGINT"
    torch.manual_seed(12345)  # the caller's generator has no part in it
    result = run(config, tmp_path / "parts", resume=True)
    assert (result.step, result.interrupted) == (8, None)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_runs_differ_by_seed_and_by_dropout(tmp_path):
    """That the comparison above can tell runs apart."""
    losses = set()
    for name, overrides in {"a": [], "b": ["seed=4"], "c": ["model.dropout=0.2"]}.items():
        run(tiny(tmp_path, "clm", "steps=2", *overrides), tmp_path / name)
        losses.add(outcome(tmp_path / name)["records"][1]["loss"])
    assert len(losses) == 3


def test_random_numbers_of_the_caller_stay_as_they_were(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(tiny(tmp_path, "clm", "steps=1"), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(tmp_path, number):
    handler = signal.getsignal(number)
    watcher = At(2, lambda: signal.raise_signal(number))
    result = train(tiny(tmp_path), tmp_path / "run", observers=[watcher])
    assert (result.step, result.interrupted) == (2, number.name)
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-000002"
    assert any(number.name in notice and "resume" in notice for notice in watcher.notices)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert signal.getsignal(number) is handler


def test_a_second_interrupt_aborts_at_once(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tiny(tmp_path), tmp_path / "run", 4, lambda: (interrupt(), interrupt()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run" / "checkpoints" / "step-000004").exists()
    assert run(tiny(tmp_path), tmp_path / "run", resume=True).step == 8


SCRIPT = """
import sys, torch
from pathlib import Path
from llmengine.training import RunConfig, checkpoint, train
torch.set_num_threads(int(sys.argv[3]))
output = Path(sys.argv[2])
train(RunConfig.from_file(sys.argv[1]), output, resume=(output / "config.yaml").is_file())
"""


def start(config: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, config, output, str(torch.get_num_threads())]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_nine_at_random_moments(tmp_path, workers):
    """Saves at every step, so that kills fall into saves too; each process lives for one to four steps."""
    options = ("steps=12", "every.save=1", "every.evaluate=5", f"data.workers={workers}")
    config: RunConfig = tiny(tmp_path, "clm", *options)
    config.to_file(tmp_path / "config.yaml")
    run(config, tmp_path / "whole")
    draw, output = random.Random(workers), tmp_path / "killed"
    for _ in range(4):
        process = start(tmp_path / "config.yaml", output)
        until = lines(output / "metrics.jsonl") + draw.randint(1, 2)
        while lines(output / "metrics.jsonl") < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    assert start(tmp_path / "config.yaml", output).wait(timeout=120) == 0
    assert outcome(output) == outcome(tmp_path / "whole")
    assert not list((output / "checkpoints").glob(".*"))


def test_checkpoints_of_pytorchs_optimizer_are_read_and_ours_are_like_them(tmp_path, monkeypatch):
    """Runs of before this engine had an optimizer of its own."""

    class Torchs(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, fused=True)

        def step(self, closure=None, *, gradient_scale=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if gradient_scale is not None and parameter.grad is not None:
                        parameter.grad.mul_(gradient_scale)
            return super().step(closure)

    config = tiny(tmp_path)
    run(config, tmp_path / "ours")
    with monkeypatch.context() as patch:
        patch.setattr("llmengine.training.optimizer.AdamW", Torchs)
        with pytest.raises(Crash):
            run(config, tmp_path / "theirs", 5, crash)  # the checkpoint is of step 3
    assert run(config, tmp_path / "theirs", resume=True).step == 8
    ours, theirs = (outcome(tmp_path / name) for name in ("ours", "theirs"))
    for a, b in zip(ours["records"], theirs["records"], strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    states = [
        checkpoint.newest(tmp_path / name / "checkpoints", print).tensors("optimizer") for name in ("ours", "theirs")
    ]
    assert [(k, v.dtype, v.shape) for k, v in states[0].items()] == [
        (k, v.dtype, v.shape) for k, v in states[1].items()
    ]
