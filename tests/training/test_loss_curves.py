"""benchmarks/loss_curves.py, on a run of eight steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.training.runs import tiny

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "loss_curves.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("loss_curves", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_curves_of_all_precisions(program, tmp_path):
    tiny(tmp_path).to_file(tmp_path / "tiny.yaml")
    results = tmp_path / "curves"
    program.main(["--configs", str(tmp_path / "tiny.yaml"), "--steps", "8", "--results", str(results)])
    (case,) = json.loads(results.with_suffix(".json").read_text())["curves"]
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {name: len(losses) for name, losses in case["losses"].items()} == dict.fromkeys(program.CURVES, 8)
    # each is another computation of the same run, the other seed another run
    first = {name: losses[0] for name, losses in case["losses"].items()}
    assert len(set(map(tuple, case["losses"].values()))) == len(program.CURVES)
    for name in ("autocast", "bf16"):
        assert first[name] == pytest.approx(first["fp32"], rel=0.01)
        assert 0 < case["apart"][name] < case["apart"]["fp32, another seed"]


def test_a_curve_that_departs_is_seen(program):
    losses = [1 / step for step in range(1, 101)]
    assert program.apart(losses, losses, 10) == 0
    departing = [loss + (0.1 if step > 50 else 0) for step, loss in enumerate(losses)]
    assert program.apart(losses, departing, 10) == pytest.approx(0.1, abs=0.01)
    assert program.apart(losses, [loss + (0.1 if step < 3 else 0) for step, loss in enumerate(losses)], 60) < 0.01
