"""benchmarks/gpu_suite.py, as far as a machine without a GPU can prove it: every case runs, in Triton's interpreter."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from llmengine.roofline import apart

ROOT = Path(__file__).resolve().parent.parent
PASSES = {"decode_attention": ("forward",), "adamw": ("step",), "gradient_norm": ("step",)}
SUITE = ROOT / "benchmarks" / "gpu_suite.py"


def test_every_case_runs_and_is_recorded(tmp_path):
    command = [sys.executable, str(SUITE), "--smoke", "--skip-build", "--skip-tests", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_smoke.json", "plots.zip"]
    result = json.loads((tmp_path / "gpu_smoke.json").read_text())
    rows, machine = result["rows"], result["machine"]
    assert machine["device"] == machine["processor"] and re.fullmatch(r"[0-9a-f]{7,}", machine["commit"])
    assert not [row for row in rows if "error" in row]
    operators = {row["operator"] for row in rows}
    assert operators == {
        "attention", "attention_sinks", "attention_options", "decode_attention", "layer_norm", "rms_norm",
        "add_layer_norm", "add_rms_norm", "softmax", "cross_entropy", "linear_cross_entropy",
        "ffn", "gated_ffn", "rotary", "embedding", "adamw", "gradient_norm",
    }  # fmt: skip
    for operator in operators:
        for which in PASSES.get(operator, ("forward", "forward + backward")):
            peers = {row["peer"] for row in rows if row["operator"] == operator and row["pass"] == which}
            assert {"llmengine triton", "torch"} <= peers, (operator, which)
    assert all(row["ms"] > 0 and row["percent"] > 0 for row in rows)
    with zipfile.ZipFile(tmp_path / "plots.zip") as pack:
        assert {file.filename for file in pack.infolist() if file.file_size > 1000} == {f"{o}.png" for o in operators}


@pytest.mark.parametrize("wrong", ["", "memcheck", "racecheck", "synccheck", "initcheck"])
def test_the_sanitizer_runs_its_four_tools_and_passes_on_what_they_say(wrong: str, tmp_path, suite):
    """By a stand-in that writes down how it is called, and a Python that finds a GPU. What it runs are all laws, but
    those of single instructions and of graphs."""
    tool = f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$2" != "{wrong}" ] || exit 7\n'
    for name, script in {"compute-sanitizer": tool, "python": "#!/bin/sh\nexit 0\n"}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SUITE.with_name("gpu_sanitizer.sh"))], env=environment, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    tools = ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert [call.split()[:2] for call in calls] == [["--tool", t] for t in tools[: tools.index(wrong or tools[-1]) + 1]]
    assert all(" --error-exitcode 1 python -m pytest -q -x tests/" in call for call in calls)
    files = {word for word in calls[0].split() if word.startswith("tests/")}
    assert files == {"tests/test_ops.py", *suite.ATTENTION, *suite.HOPPERS_ATTENTION, *suite.PRODUCTS}
    asked = re.search(r" -k (.*) -m not heavy$", calls[0])
    assert asked is not None and set(asked[1].split(" or ")) >= {
        name for law in suite.laws((9, 0)) if files & {*law.files} for name in law.ids.split(" or ")
        if not name.startswith("[cuda-") or law.name == "cuda"
    }  # fmt: skip
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
    command = [
        sys.executable,
        "-c",
        COLLECT,
        json.dumps([["-q" if a == "-v" else a for a in law.command[3:]] for law in laws]),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("====")
    return {
        law.name: re.findall(r"^tests/\S+::.*$", part, re.MULTILINE) for law, part in zip(laws, parts, strict=False)
    }


def test_laws_are_those_of_devices_and_each_runs_once(collected):
    """No case of the simulator, which would be built for it, nor of the CPU."""
    places = {"cuda in 16 bits": r"cuda-(sm80|blas|torch)", "cuda for Hopper": "cuda-sm90a", "triton": r"\[triton-"}
    places |= {"instructions": r"\[gpu", "instructions of Hopper": r"\[gpu"}
    for name, cases in collected.items():
        place = places.get(name, r"\[cuda-")
        assert len(cases) > 20 and all(re.search(place, case) and "cuda_sim" not in case for case in cases), name
    known = [case for name in collected if name != "cuda by Hopper's kernels" for case in collected[name]]
    assert len(known) == len(set(known))


def test_every_kernel_for_hopper_is_checked_and_all_that_test_ops_leaves_out(collected):
    hopper = {case.split("::")[0] for case in collected["cuda for Hopper"]}
    names = (
        "attention_sm90a",
        "attention_sm90a_backward",
        "attention_one_pass",
        "ffn",
        "fp8_attention",
        "linear",
        "linear_cross_entropy",
        "linear_cross_entropy_shard",
        "main_grad",
    )
    assert hopper == {f"tests/sim/test_{name}.py" for name in names}
    every, by_hopper = (
        {re.split(r"\[cuda-|[\]-]", case.split("::")[1])[1] for case in collected[name]}
        for name in ("cuda", "cuda by Hopper's kernels")
    )
    losses = {"linear_cross_entropy", "linear_cross_entropy_at_once"}
    assert by_hopper == {"ffn", "linear", "scaled_dot_product_attention"} | losses
    left_out = {case.split("::")[0] for case in collected["cuda in 16 bits"]}
    assert {"layer_norm", "softmax", "cross_entropy", "embedding", "adamw", "ffn", "linear"} <= every
    assert {f"tests/sim/test_{n}.py" for n in ("attention", "decode_attention", "linear_cross_entropy")} <= left_out
    captured = {re.split(r"[-\[]", case)[2] for case in collected["cuda"] if "test_cuda_graphs" in case}
    assert {"scaled_dot_product_attention", "decode_attention", "linear_cross_entropy", "ffn"} <= captured


def test_hoppers_laws_run_on_hopper_alone_and_ask_for_its_kernels(suite):
    everywhere = ["cuda", "instructions", "cuda in 16 bits", "triton"]
    assert [law.name for law in suite.laws((8, 0))] == everywhere
    first = [law.name for law in suite.laws((9, 0))]
    assert first[3:] == everywhere and all("Hopper" in name for name in first[:3])
    asked = {law.name: law.environment for law in suite.laws((9, 0)) if law.environment}
    assert asked == {
        "cuda by Hopper's kernels": {"LLMENGINE_CUDA_ATTENTION": "sm90a", "LLMENGINE_CUDA_PRODUCTS": "sm90a"}
    }


def test_every_law_has_a_slice_names_what_hangs_and_all_are_a_command(suite):
    for slice_, whole in zip(suite.laws((9, 0)), suite.laws((9, 0), whole=True), strict=True):
        assert slice_.command[slice_.command.index("not heavy") - 1] == "-m" and "not heavy" not in whole.command
        for law in (slice_, whole):
            assert law.command[law.command.index("--timeout-method") + 1] == "thread" and "-v" in law.command
            assert ("-n" in law.command) == ("instructions" not in law.name)  # whose tests share what nvcc makes


HANGS = """
import time

def test_passes():
    pass

def test_hangs():
    time.sleep(60)
"""


def test_a_test_that_hangs_is_named(suite, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(HANGS)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "HUNG", 2)
    law = suite.laws((8, 0))[1]
    assert law.name == "instructions"
    command = suite.Laws("it", ("tests/test_it.py",), "test", options=law.options).command
    done = suite.shell(command, 50)
    assert done["status"] not in (0, None) and done["failed"] and done["last"] == "tests/test_it.py::test_hangs"


def test_the_children_of_what_is_cut_off_end_with_it(suite, monkeypatch, tmp_path):
    """Else they would keep the pipe open, and the device."""
    monkeypatch.setattr(suite, "GRACE", 1.0)
    start = time.perf_counter()
    done = suite.shell(["sh", "-c", f"trap '' INT; sleep 60 & echo $! > {tmp_path}/child; wait"], 2)
    assert done["status"] is None and time.perf_counter() - start < 20
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


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
    """What is cut off has failed where something that ran did, and where nothing had passed."""
    trials = (("quick", "-", 0, 0), ("wrong", "-", 0, 3), ("slow", "9 passed in 3 s", 60, 0),
              ("failing", "1 failed, 8 passed in 3 s", 60, 0), ("deaf", "", 60, 0))  # fmt: skip

    class Law(suite.Laws):
        @property
        def command(self):
            count, seconds, status = self.files
            return [sys.executable, "-c", TRIAL.format(count=count, seconds=seconds, status=status)]

    made = [Law(name, given, "", {"LAW": name}) for name, *given in trials]
    monkeypatch.setattr(suite, "laws", lambda capability, whole: made)
    kept: list[int] = []
    monkeypatch.setattr(suite.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(suite, "GRACE", 2.0)
    start = time.perf_counter()
    results = suite.run_laws(16, keep=lambda so_far: kept.append(len(so_far)))
    assert kept == [1, 2, 3, 4, 5]
    assert time.perf_counter() - start < 50
    assert {name: (done["status"], done["failed"]) for name, done in results.items()} == {
        "quick": (0, False), "wrong": (3, True), "slow": (None, False), "failing": (None, True), "deaf": (None, True),
    }  # fmt: skip
    assert [results[name]["tail"] for name in ("quick", "wrong", "deaf")] == [["quick"], ["wrong"], ["deaf"]]


def test_time_is_shared_by_weight(suite, monkeypatch):
    now, given = [0.0], {}
    made = [suite.Laws(name, (), "", weight=weight) for name, weight in (("a", 1.0), ("b", 3.0), ("c", 1.0))]

    def shell(command, seconds, environment):
        name = made[len(given)].name
        given[name] = seconds
        now[0] += 0.0 if name == "a" else seconds
        return {"status": 0, "failed": False, "seconds": seconds, "passed": 1, "last": None, "tail": []}

    monkeypatch.setattr(suite, "laws", lambda capability, whole: made)
    monkeypatch.setattr(suite, "shell", shell)
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(suite.torch.cuda, "get_device_capability", lambda: (9, 0))
    suite.run_laws(100.0)
    assert given == {"a": 20.0, "b": 75.0, "c": 25.0}


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_the_parts_of_the_budget_end_before_a_lent_machines_command_does(suite):
    parts = suite.BUILDING + suite.TESTING + suite.TIMING + suite.DRAWING
    assert parts == suite.BUDGET == 8 * 60 <= 600 - 2 * suite.GRACE - apart.ENDING


def options(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"skip_build": False, "skip_tests": False} | given)


@pytest.mark.parametrize("status", [1, None])
def test_a_build_that_fails_ends_the_command(suite, monkeypatch, tmp_path, status):
    told = {"status": status, "failed": status is not None, "seconds": 1.0, "passed": 0, "last": None, "tail": ["no"]}
    monkeypatch.setattr(suite, "shell", lambda *_: dict(told))
    monkeypatch.setattr(suite, "run_laws", lambda *_, **__: pytest.fail("nothing to test"))
    record = suite.Record(tmp_path / "gpu.json")
    assert not suite.build_and_test(options(), lambda: 500.0, record)
    assert record.failed and json.loads(record.path.read_text())["build"]["tail"] == ["no"]


def test_the_budget_is_kept_where_everything_takes_its_limit(suite, monkeypatch, tmp_path):
    now = [0.0]

    def shell(command, seconds, environment=None):
        now[0] += seconds
        return {"status": 0, "failed": False, "seconds": seconds, "passed": 1, "last": None, "tail": []}

    monkeypatch.setattr(suite, "shell", shell)
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(suite.torch.cuda, "get_device_capability", lambda: (9, 0))
    record = suite.Record(tmp_path / "gpu.json")
    assert suite.build_and_test(options(), lambda: suite.BUDGET - now[0], record)
    assert set(json.loads(record.path.read_text())["tests"]) == {law.name for law in suite.laws((9, 0))}
    assert suite.BUDGET - now[0] >= suite.TIMING - 1e-6 and not record.failed


# ---- times -----------------------------------------------------------------------------------------------------------

# The process that times, of two operators, the first with a peer that ends it.
BREAKS = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
from llmengine.roofline import apart
made, wait, broken = apart.cases, apart.Clock.wait, []

def wrong(x):
    if sys.argv[1] == "abort":
        os.abort()
    broken.append(True)

def told(clock):
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    wait(clock)

def cases(*given):
    for case in made(*given):
        if case.operator == "softmax":
            case.__dict__["run"] = {"llmengine": case.run["llmengine"], "wrong": wrong, "torch": case.run["torch"]}
        yield case

apart.cases, apart.Clock.wait = cases, told
apart.OPERATORS = {name: apart.OPERATORS[name] for name in ("softmax", "linear", "cross_entropy")}
raise SystemExit(apart.time_here(True, json.loads(sys.argv[2])))
"""


@pytest.mark.parametrize("how", ["abort", "illegal access"])
def test_a_peer_that_breaks_the_device_costs_itself_alone(how: str):
    kept: list[int] = []
    command = [sys.executable, "-c", BREAKS, how]
    result = apart.Times(lambda: 200.0, lambda told: kept.append(len(told["rows"])), program=command).all()
    both = "forward + backward"
    rows = [(row["operator"], row["pass"], row["peer"]) for row in result["rows"] if "error" not in row]
    peers = ("llmengine triton", "torch")
    assert rows[:4] == [("softmax", which, peer) for which in ("forward", both) for peer in peers]
    assert rows[4:] == [
        ("cross_entropy", which, peer) for _ in range(2) for which in ("forward", both) for peer in peers
    ]
    (error,) = [row for row in result["rows"] if "error" in row]
    assert (error["operator"], error["pass"], error["peer"]) == ("softmax", "forward", "wrong")
    assert ("ended with -6" if how == "abort" else "CUDA error: an illegal memory access") in error["error"]
    assert result["cut"] is None and kept[-1] == len(result["rows"]) and len(kept) >= 3
    assert result["machine"]["commit"]


# Says what a process that times would, from "behind" on, and hangs at the second of five peers.
HANGING = """
import json, sys, time
behind = json.loads(sys.argv[1])
say = lambda **event: print(json.dumps(event), flush=True)
print("a compiler's words", flush=True)
if "ceilings" not in behind:
    say(ceilings={"gbytes_per_s": 1.0, "tflops": {"fp16": 1.0}}, machine={"commit": "1"})
for i in range(5):
    row = {"operator": "op", "case": "c", "dtype": "fp16", "peer": f"p{i}", "pass": "forward"}
    if ["forward", f"p{i}"] in behind.get("begun", []) or f"p{i}" in behind.get("without", []):
        continue
    say(begun=row, number=0)
    time.sleep(60 * (i == 1))
    say(row=row | {"error": "none"})
say(finished=True)
"""
HANGS_THEN = [sys.executable, "-c", HANGING]


def test_a_peer_that_hangs_is_named_and_left(monkeypatch):
    monkeypatch.setattr(apart, "STUCK", 3.0)
    result = apart.Times(lambda: 100.0, lambda told: None, program=HANGS_THEN).all()
    assert [row["peer"] for row in result["rows"]] == [f"p{i}" for i in range(5)] and result["cut"] is None
    assert result["rows"][1]["error"] == "hung: nothing for 3 s: a compiler's words"


def test_what_the_budget_cuts_is_told_and_what_was_timed_is_kept():
    end = time.perf_counter() + 3.0
    result = apart.Times(lambda: end - time.perf_counter(), lambda told: None, program=HANGS_THEN).all()
    assert result["cut"] == "the budget ended at op c, p1" and [row["peer"] for row in result["rows"]] == ["p0"]


def test_timing_that_never_begins_ends_the_command_as_a_failure(suite, tmp_path):
    record = suite.Record(tmp_path / "gpu.json")
    command = [sys.executable, "-c", "raise SystemExit('no kernel image')"]
    result = apart.Times(lambda: 100.0, lambda told: record.add(**told), program=command).all()
    assert result["cut"] == "timing ended before a case (1): no kernel image" and record.failed
