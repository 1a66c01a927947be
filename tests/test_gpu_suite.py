"""benchmarks/gpu_suite.py, as far as a machine without a GPU can prove it: every case runs, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PASSES = {"decode_attention": ("forward",), "adamw": ("step",), "gradient_norm": ("step",)}
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
        "attention", "attention_sinks", "decode_attention", "layer_norm", "rms_norm", "add_layer_norm", "softmax",
        "cross_entropy", "linear_cross_entropy", "ffn", "rotary", "embedding", "adamw", "gradient_norm",
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


# ---- laws ------------------------------------------------------------------------------------------------------------

# Collects the cases of all laws as where a Hopper is.
COLLECT = """
import json, shutil, sys, pytest, torch
from llmengine.ops import registry
torch.cuda.is_available = lambda: True
shutil.which = lambda command: command
torch.cuda.get_device_capability = lambda *_: (9, 0)
for name in ("cuda", "triton"):
    registry.load(name).unavailable = None
for arguments in json.loads(sys.argv[1]):
    assert pytest.main([*arguments, "--collect-only"]) == 0
    print("====")
"""


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("gpu_suite", SUITE)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def collected(suite) -> dict[str, list[str]]:
    """Ids of the cases that laws would run on a Hopper."""
    laws = suite.laws((9, 0))
    assert all(law.command[:3] == [sys.executable, "-m", "pytest"] for law in laws)
    command = [sys.executable, "-c", COLLECT, json.dumps([law.command[3:] for law in laws])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("====")
    return {
        law.name: re.findall(r"^tests/\S+::.*$", part, re.MULTILINE) for law, part in zip(laws, parts, strict=False)
    }


def test_laws_are_those_of_devices_and_each_runs_once(collected):
    """No case of the simulator, which would be built for it, nor of the CPU."""
    places = {"cuda in 16 bits": "cuda-sm80", "cuda for Hopper": "cuda-sm90a"}
    places |= {"instructions": "[gpu", "instructions of Hopper": "[gpu"}
    for name, cases in collected.items():
        place = places.get(name, "[triton-" if name == "triton" else "[cuda-")
        assert len(cases) > 20 and all(place in case and "cuda_sim" not in case for case in cases), name
    known = [case for name in collected if name != "cuda by Hopper's products" for case in collected[name]]
    assert len(known) == len(set(known))


def test_every_kernel_for_hopper_is_checked_and_all_that_test_ops_leaves_out(collected):
    hopper = {case.split("::")[0] for case in collected["cuda for Hopper"]}
    names = (
        "attention_sm90a",
        "attention_sm90a_backward",
        "attention_one_pass",
        "ffn",
        "linear",
        "linear_cross_entropy",
    )
    assert hopper == {f"tests/sim/test_{name}.py" for name in names}
    every, by_hopper = (
        {re.split(r"\[cuda-|[\]-]", case.split("::")[1])[1] for case in collected[name]}
        for name in ("cuda", "cuda by Hopper's products")
    )
    assert by_hopper == {"ffn", "linear"}
    left_out = {case.split("::")[0] for case in collected["cuda in 16 bits"]}
    assert {"layer_norm", "softmax", "cross_entropy", "embedding", "adamw", "ffn", "linear"} <= every
    assert {f"tests/sim/test_{n}.py" for n in ("attention", "decode_attention", "linear_cross_entropy")} <= left_out


def test_hoppers_laws_run_on_hopper_alone_and_ask_for_its_kernels(suite):
    assert [law.name for law in suite.laws((8, 0))] == ["cuda", "instructions", "cuda in 16 bits", "triton"]
    asked = {law.name: law.environment for law in suite.laws((9, 0)) if law.environment}
    assert asked == {
        "cuda by Hopper's products": {"LLMENGINE_CUDA_ATTENTION": "sm90a", "LLMENGINE_CUDA_PRODUCTS": "sm90a"}
    }


def test_laws_share_their_time_and_all_are_recorded(suite, monkeypatch):
    code = "import os, time; print(os.environ['LAW']); time.sleep({}); raise SystemExit({})"
    trials = (("quick", 0, 0), ("wrong", 0, 3), ("endless", 60, 0))

    class Law(suite.Laws):
        command = property(lambda self: [sys.executable, "-c", code.format(*self.files)])

    made = [Law(name, (seconds, status), "", {"LAW": name}) for name, seconds, status in trials]
    monkeypatch.setattr(suite, "laws", lambda capability: made)
    monkeypatch.setattr(suite.torch.cuda, "get_device_capability", lambda: (9, 0))
    start = time.perf_counter()
    results = suite.run_laws(3)
    assert time.perf_counter() - start < 30
    assert {name: done["status"] for name, done in results.items()} == {"quick": 0, "wrong": 3, "endless": None}
    assert [results[name]["tail"] for name in ("quick", "wrong")] == [["quick"], ["wrong"]]
