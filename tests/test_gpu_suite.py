"""benchmarks/gpu_suite.py, as far as a machine without a GPU can prove it: every case runs, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSES = {"adamw": ("step",), "gradient_norm": ("step",)}
SUITE = ROOT / "benchmarks" / "gpu_suite.py"


def test_every_case_runs_and_is_recorded(tmp_path):
    command = [sys.executable, str(SUITE), "--smoke", "--skip-build", "--skip-tests", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(tmp_path.glob("gpu_smoke_*.json")).read_text())
    rows = result["rows"]
    assert not [row for row in rows if "error" in row]
    operators = {row["operator"] for row in rows}
    assert operators == {
        "attention", "attention_sinks", "layer_norm", "rms_norm", "add_layer_norm", "softmax", "cross_entropy",
        "linear_cross_entropy", "ffn", "rotary", "embedding", "adamw", "gradient_norm",
    }  # fmt: skip
    for operator in operators:
        for which in PASSES.get(operator, ("forward", "forward + backward")):
            peers = {row["peer"] for row in rows if row["operator"] == operator and row["pass"] == which}
            assert {"llmengine triton", "torch"} <= peers, (operator, which)
        assert (tmp_path / f"gpu_{operator}.png").stat().st_size > 1000
    assert all(row["ms"] > 0 and row["percent"] > 0 for row in rows)


def test_without_a_gpu_it_says_so(tmp_path):
    script = (
        "import sys, runpy, torch; torch.cuda.is_available = lambda: False;"
        f"sys.argv = ['gpu_suite', '--output', {str(tmp_path)!r}]; runpy.run_path({str(SUITE)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and "PyTorch sees no GPU" in done.stderr and not list(tmp_path.iterdir())
