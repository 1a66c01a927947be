"""benchmarks/gpu_suite.py, as far as a machine without a GPU can prove it: every case runs, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
PASSES = {"decode_attention": ("forward",), "adamw": ("step",), "gradient_norm": ("step",)}
SUITE = ROOT / "benchmarks" / "gpu_suite.py"


def test_every_case_runs_and_is_recorded(tmp_path):
    command = [sys.executable, str(SUITE), "--smoke", "--skip-build", "--skip-tests", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(tmp_path.glob("gpu_smoke_*.json")).read_text())
    rows, machine = result["rows"], result["machine"]
    assert machine["device"] == machine["processor"] and re.fullmatch(r"[0-9a-f]{7,}", machine["commit"])
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


@pytest.mark.parametrize("wrong", ["", "memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_runs_its_three_tools_and_passes_on_what_they_say(wrong: str, tmp_path):
    """By a stand-in that writes down how it is called, and a Python that finds a GPU."""
    tool = f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$2" != "{wrong}" ] || exit 7\n'
    for name, script in {"compute-sanitizer": tool, "python": "#!/bin/sh\nexit 0\n"}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SUITE.with_name("gpu_sanitizer.sh"))], env=environment, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    tools = ["memcheck", "racecheck", "synccheck"]
    assert [call.split()[:2] for call in calls] == [["--tool", t] for t in tools[: tools.index(wrong or tools[-1]) + 1]]
    ending = "--error-exitcode 1 python -m pytest -q -x tests/test_ops.py -k triton or cuda -m not heavy"
    assert all(call.endswith(ending) for call in calls)
    assert done.returncode == (7 if wrong else 0)


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


def test_of_tritons_laws_every_run_has_a_slice_and_all_are_a_command(suite):
    slice_, whole = (suite.laws((8, 0), whole)[-1].command for whole in (False, True))
    assert "triton" in suite.laws((8, 0))[-1].name
    at = slice_.index("not heavy") - 1
    assert slice_[at] == "-m" and slice_[:at] + slice_[at + 2 :] == whole


# Sleeps; what is interrupted ends as pytest does, and one trial does not listen.
TRIAL = """
import os, signal, time
def interrupted(*_):
    print({count!r}, flush=True)
    raise SystemExit(2)
signal.signal(signal.SIGINT, interrupted if {count!r} else signal.SIG_IGN)
print(os.environ["LAW"], flush=True)
time.sleep({seconds})
raise SystemExit({status})
"""


def test_laws_share_their_time_and_all_are_recorded(suite, monkeypatch):
    """What is cut off has failed where something that ran did."""
    trials = (("quick", "-", 0, 0), ("wrong", "-", 0, 3), ("slow", "9 passed in 3 s", 60, 0),
              ("failing", "1 failed, 8 passed in 3 s", 60, 0), ("deaf", "", 60, 0))  # fmt: skip

    class Law(suite.Laws):
        @property
        def command(self):
            count, seconds, status = self.files
            return [sys.executable, "-c", TRIAL.format(count=count, seconds=seconds, status=status)]

    made = [Law(name, given, "", {"LAW": name}) for name, *given in trials]
    monkeypatch.setattr(suite, "laws", lambda capability, whole: made)
    monkeypatch.setattr(suite.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(suite, "GRACE", 2.0)
    start = time.perf_counter()
    results = suite.run_laws(25)
    assert time.perf_counter() - start < 50
    assert {name: (done["status"], done["failed"]) for name, done in results.items()} == {
        "quick": (0, False), "wrong": (3, True), "slow": (None, False), "failing": (None, True), "deaf": (None, False),
    }  # fmt: skip
    assert [results[name]["tail"] for name in ("quick", "wrong", "deaf")] == [["quick"], ["wrong"], ["deaf"]]


class Time:
    """A budget of which everything takes what it may, and a case the given seconds."""

    def __init__(self, suite, case: float):
        self.now, self.case, self.budget = 0.0, case, suite.BUDGET
        self.compiled: list[bool] = []

    def left(self) -> float:
        return self.budget - self.now

    def shell(self, command, seconds, environment=None) -> dict:
        self.now += seconds
        return {"status": None, "failed": False, "seconds": seconds, "tail": []}

    def measure(self, case, compiled) -> list[dict]:
        self.now += self.case
        self.compiled.append(compiled)
        return [{"operator": case.operator}]


@pytest.mark.parametrize("seconds", [1.0, 20.0, 45.0])
def test_the_budget_is_kept_where_everything_takes_its_limit(suite, monkeypatch, seconds: float):
    given, cases = Time(suite, seconds), [SimpleNamespace(operator=f"op{n // 3}", name="n") for n in range(300)]
    monkeypatch.setattr(suite, "shell", given.shell)
    monkeypatch.setattr(suite.time, "perf_counter", lambda: given.now)
    monkeypatch.setattr(suite.torch.cuda, "get_device_capability", lambda: (9, 0))
    result = suite.build_and_test(SimpleNamespace(skip_build=False, skip_tests=False), given.left)
    assert set(result["tests"]) == {law.name for law in suite.laws((9, 0))}
    assert given.left() >= suite.TIMING - 1e-6
    rows, cut = suite.time_cases(cases, given.measure, given.left)
    assert given.now < 480
    assert cut == f"the budget ended before op{len(rows) // 3} n" and len(rows) >= 2
    assert given.compiled == [n % 3 == 0 for n in range(len(rows))]


def test_cases_that_there_is_time_for_are_not_cut(suite):
    cases = [SimpleNamespace(operator="op", name="n")] * 5
    rows, cut = suite.time_cases(cases, Time(suite, 1.0).measure, lambda: 100.0)
    assert len(rows) == 5 and cut is None
