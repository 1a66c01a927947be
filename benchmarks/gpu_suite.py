"""One command on a GPU: builds, runs the operator laws, times every operator beside PyTorch, writes JSON and plots.

    python benchmarks/gpu_suite.py [--output DIR] [--skip-build] [--skip-tests] [--seconds 460]
    python benchmarks/gpu_suite.py --laws all       the whole grid of laws, however long it takes, and nothing else

Cases, ceilings and percentages are those of `llmengine bench` (llmengine/roofline), once for each backend that can run
here. A case that fails is reported with its error and does not stop the rest; the budget in seconds cuts the list of
cases, not a case. Of Triton's laws, whose kernels are compiled at each new combination of options, it runs what every
commit runs in the interpreter. What time cuts off is told, and is no failure: the exit status is 1 where something
that ran was wrong. --smoke runs tiny shapes on the CPU in Triton's interpreter: it proves the suite; its times mean
nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

BUDGET = 460.0  # seconds of the whole command, of which at most
BUILDING = 180.0  # are the build's,
TESTING = 200.0  # the laws',
TIMING = 130.0  # and at least the benchmarks'; of these
LAST = 30.0  # are left when a last case begins, or what the longest has taken
GRACE = 10.0  # in which a command that is cut off may tell how far it came

OPERATORS = ("tests/test_ops.py", "tests/test_cuda_graphs.py")
ATTENTION = ("tests/sim/test_attention.py", "tests/sim/test_decode_attention.py")
HOPPERS_ATTENTION = tuple(f"tests/sim/test_attention_{x}.py" for x in ("sm90a", "sm90a_backward", "one_pass"))
PRODUCTS = ("tests/sim/test_ffn.py", "tests/sim/test_linear.py", "tests/sim/test_linear_cross_entropy.py")
HOPPER = {"LLMENGINE_CUDA_ATTENTION": "sm90a", "LLMENGINE_CUDA_PRODUCTS": "sm90a"}


@dataclass(frozen=True)
class Laws:
    """Tests that run on a GPU: files, and which of their cases by a part of their ids, that no case on a CPU has."""

    name: str
    files: tuple[str, ...]
    ids: str
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "pytest", "-q", "--maxfail=20", *self.files, "-k", self.ids, *self.options]


def laws(capability: tuple[int, int], whole: bool = False) -> list[Laws]:
    """In their order: Triton's, which compile longest, last, and not the `whole` grid of them unless asked for. What
    Hopper has of its own runs on Hopper."""
    compilers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    hopper = [
        Laws("instructions of Hopper", ("tests/sim/test_hopper.py",), "[gpu"),
        Laws("cuda for Hopper", (*HOPPERS_ATTENTION, *PRODUCTS), "cuda-sm90a"),
        Laws("cuda by Hopper's products", OPERATORS, "[cuda-ffn or [cuda-linear", HOPPER),
    ]
    return [
        Laws("cuda", OPERATORS, "[cuda-"),
        Laws("instructions", ("tests/sim/test_layouts.py",), "[gpu"),
        Laws("cuda in 16 bits", (*ATTENTION, *PRODUCTS), "cuda-sm80"),
        *(hopper if capability == (9, 0) else []),
        Laws("triton", OPERATORS, "[triton-", options=compilers if whole else ("-m", "not heavy", *compilers)),
    ]


def run_laws(seconds: float, whole: bool = False) -> dict[str, dict[str, Any]]:
    """Each has an equal share of the time, and what those before it have left of theirs."""
    end, results = time.perf_counter() + seconds, {}
    chosen = laws(torch.cuda.get_device_capability(), whole)
    for number, law in enumerate(chosen):
        share = (end - time.perf_counter()) / (len(chosen) - number)
        results[law.name] = done = shell(law.command, share, law.environment)
        what = "cut off after" if done["status"] is None else f"exit status {done['status']},"
        print(f"tests, {law.name}: {what} {done['seconds']} s", *done["tail"][-1:])
    return results


def shell(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a command; its exit status (None: cut off), seconds, the end of what it wrote, and whether it failed: one
    that is cut off did where pytest, interrupted, counts failures."""
    start, env = time.perf_counter(), os.environ | (environment or {})
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
    )
    status, text = None, ""
    try:
        text = run.communicate(timeout=None if math.isinf(seconds) else max(0.0, seconds - GRACE))[0]
        status = run.returncode
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGINT)
        try:
            text = run.communicate(timeout=min(GRACE, max(0.0, seconds)))[0]
        except subprocess.TimeoutExpired:
            run.kill()
            text = run.communicate()[0]
    failed = status != 0 if status is not None else re.search(r"\b\d+ (failed|errors?)\b", text) is not None
    seconds = round(time.perf_counter() - start, 1)
    return {"status": status, "failed": failed, "seconds": seconds, "tail": text.splitlines()[-15:]}


def build_and_test(given: argparse.Namespace, left: Callable[[], float]) -> dict[str, Any]:
    """What is not timed, within its part of the budget."""
    result: dict[str, Any] = {}
    if not given.skip_build:
        install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        result["build"] = shell(install, min(BUILDING, left()))
        print("build:", result["build"]["status"], result["build"]["seconds"], "s")
        if result["build"]["status"] != 0:
            print("\n".join(result["build"]["tail"]))
    if not given.skip_tests:
        result["tests"] = run_laws(min(TESTING, left() - TIMING))
    return result


def time_cases(cases, measure: Callable[..., list[dict]], left: Callable[[], float]) -> tuple[list[dict], str | None]:
    """Rows of all cases, or of those that there is time for, and what cut them. The first case of an operator is timed
    beside torch.compile, too: its compiler takes longer than all others together."""
    rows: list[dict] = []
    operators, longest = set(), LAST
    for case in cases:
        if (begun := left()) < longest:
            return rows, f"the budget ended before {case.operator} {case.name}"
        rows += measure(case, compiled=case.operator not in operators)
        operators.add(case.operator)
        longest = max(longest, begun - left())
    return rows, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks" / "results")))
    parser.add_argument("--seconds", type=float, default=BUDGET, help="budget of the whole command")
    parser.add_argument("--laws", choices=("slice", "all"), default="slice", help="all: every sample, nothing timed")
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    given = parser.parse_args()
    start = time.perf_counter()

    def left() -> float:
        return given.seconds - (time.perf_counter() - start)

    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("gpu_suite: PyTorch sees no GPU here; --smoke runs the suite's own code on the CPU", file=sys.stderr)
        return 2
    if given.laws == "all":
        return int(any(done["failed"] for done in run_laws(math.inf, whole=True).values()))
    given.output.mkdir(parents=True, exist_ok=True)
    result = build_and_test(given, left)

    sys.path.insert(0, str(ROOT))  # what was built above
    from llmengine import roofline
    from llmengine.ops.registry import load

    device = "cpu" if given.smoke else "cuda"
    backends = [b for b in ("cuda", "triton") if load(b).unavailable is None]
    result["machine"] = machine = roofline.machine(device)
    result["backends"] = {b: load(b).unavailable or "usable" for b in ("cuda", "triton")}
    clock, dtype = roofline.Clock(device, 0.0), torch.float16 if given.smoke else torch.bfloat16
    ceilings = roofline.measure_ceilings(clock, [dtype], given.smoke)
    result["ceilings"] = ceilings.as_json()
    print(result["ceilings"])
    operators = [name for name, (shapes, _) in roofline.OPERATORS.items() if roofline.SHAPES["cuda"][shapes]]
    if given.smoke:
        operators.remove("linear")  # Triton has none: on a GPU, CUDA's is timed

    def measure(case, compiled: bool) -> list[dict]:
        compiled = compiled and not given.smoke
        measured = list(roofline.measure(case, clock, ceilings, backends=backends, compiled=compiled))
        print("\n".join(roofline.lines(measured)))
        return measured

    cases = roofline.cases("small" if given.smoke else device, device, dtype, operators)
    result["rows"], result["cut"] = rows, cut = time_cases(cases, measure, left)
    name = "smoke" if given.smoke else machine["device"].lower().replace(" ", "-")
    path = given.output / f"gpu_{name}_{machine['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for operator in {row["operator"] for row in rows}:
        chosen = [row for row in rows if row["operator"] == operator]
        roofline.draw(chosen, ceilings, given.output / f"gpu_{operator}.png", f"{name}, {machine['commit']}")
    print(cut or "", f"written: {path}")
    failed = any("error" in row and row["peer"].startswith("llmengine") for row in rows)
    commands = [*result.get("tests", {}).values(), *([result["build"]] if "build" in result else [])]
    return int(failed or any(done["failed"] for done in commands))


if __name__ == "__main__":
    raise SystemExit(main())
