"""One command on a GPU: builds, runs the operator laws, times every operator beside PyTorch, writes JSON and plots.

    python benchmarks/gpu_suite.py [--output DIR] [--skip-build] [--skip-tests] [--seconds 480]
    python benchmarks/gpu_suite.py --laws all       the whole grid of laws, however long it takes, and nothing else
    python benchmarks/gpu_suite.py --goals --skip-tests --seconds 1500     products of the shapes that goals name

Cases, ceilings and percentages are those of `llmengine bench` (llmengine/roofline), once for each backend that can run
here. They are timed in a process of their own: a peer that fails is a row with its error; one that breaks the device,
crashes or hangs ends the process, and another goes on behind it, without that peer in the rest of its operator. The
JSON is written anew after the build, after each law and each case, so that whatever ends this command leaves what was
known by then; the plots come in one plots.zip.

A build that fails ends the command. Of the laws it runs the slice that every commit runs. What time cuts off is told,
and is no failure where tests had passed: the exit status is 1 where something that ran was wrong. --smoke runs tiny
shapes on the CPU in Triton's interpreter: it proves the suite; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout

from llmengine import roofline  # noqa: E402
from llmengine.files import replace_text  # noqa: E402
from llmengine.roofline.apart import Times, ceilings_of, end, started  # noqa: E402

BUDGET = 480.0  # seconds of the whole command; of these at most
BUILDING = 130.0  # are the build's (535 of a processor, its longest file's 47: about a minute on 16 cores),
TESTING = 170.0  # the laws',
TIMING = 160.0  # at least the benchmarks',
DRAWING = 20.0  # and the plots'
GRACE = 10.0  # in which a command that is cut off may tell how far it came
HUNG = 20  # after which a test is taken to hang

OPERATORS = ("tests/test_ops.py", "tests/test_cuda_graphs.py")
ATTENTION = ("tests/sim/test_attention.py", "tests/sim/test_decode_attention.py")
HOPPERS_ATTENTION = tuple(
    f"tests/sim/test_{x}.py"
    for x in ("attention_sm90a", "attention_sm90a_backward", "attention_one_pass", "fp8_attention")
)
PRODUCTS = tuple(
    f"tests/sim/test_{x}.py"
    for x in ("ffn", "linear", "linear_cross_entropy", "linear_cross_entropy_shard", "main_grad")
)
BEGUN = re.compile(
    r"^(tests/\S+\.py::.*?)(?: (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS|\++ ).*)?[ \t]*$", re.MULTILINE
)
HOPPERS_CHOICE = " or ".join(f"[cuda-{x}" for x in ("ffn", "linear", "scaled_dot_product_attention"))
HOPPER = {"LLMENGINE_CUDA_ATTENTION": "sm90a", "LLMENGINE_CUDA_PRODUCTS": "sm90a"}


# ---- laws ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Laws:
    """Tests that run on a GPU: files, and which of their cases by a part of their ids, that no case on a CPU has."""

    name: str
    files: tuple[str, ...]
    ids: str
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    weight: float = 1.0  # its share of the time

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "pytest", "-v", "--maxfail=20", *self.files, "-k", self.ids, *self.options]


def laws(capability: tuple[int, int], whole: bool = False) -> list[Laws]:
    """In their order: what Hopper has of its own first, on Hopper, for nothing else has ever run it; Triton's, which
    compile longest, last. Of none the `whole` grid unless asked for. A test that hangs is named, and costs a worker."""
    alone: tuple[str, ...] = () if whole else ("-m", "not heavy")
    if importlib.util.find_spec("pytest_timeout"):
        limit = 10 * HUNG if whole else HUNG
        alone += ("--timeout", str(limit), "--timeout-method", "thread", "-o", "timeout_func_only=true")
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    many = (*alone, *workers)
    hopper = [
        Laws("instructions of Hopper", ("tests/sim/test_hopper.py",), "[gpu", options=alone),
        Laws("cuda for Hopper", (*HOPPERS_ATTENTION, *PRODUCTS), "cuda-sm90a", options=many, weight=3),
        Laws("cuda by Hopper's kernels", OPERATORS, HOPPERS_CHOICE, HOPPER, many),
    ]
    return [
        *(hopper if capability == (9, 0) else []),
        Laws("cuda", OPERATORS, "[cuda-", options=many, weight=2),
        Laws("instructions", ("tests/sim/test_layouts.py",), "[gpu", options=alone),
        Laws("cuda in 16 bits", (*ATTENTION, *PRODUCTS), "cuda-sm80 or cuda-blas or cuda-torch.", options=many),
        Laws("triton", OPERATORS, "[triton-", options=many, weight=3),
    ]


def run_laws(seconds: float, whole: bool = False, keep: Callable[[dict], None] = lambda results: None) -> dict:
    """Each has its share of the time, and of what those before it have left of theirs; `keep` has the results of all
    so far after each."""
    end, results = time.perf_counter() + seconds, {}
    chosen = laws(torch.cuda.get_device_capability(), whole)
    for number, law in enumerate(chosen):
        share = (end - time.perf_counter()) * law.weight / sum(other.weight for other in chosen[number:])
        results[law.name] = done = shell(law.command, share, law.environment)
        if done["status"] is None and not done["passed"]:
            done["failed"] = True  # cut off before a test had passed
        what = "cut off after" if done["status"] is None else f"exit status {done['status']},"
        print(f"tests, {law.name}: {what} {done['seconds']} s", *done["tail"][-1:])
        if done["failed"] or done["status"] is None:
            print(f"    last begun: {done['last']}")
        keep(results)
    return results


def shell(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a command, and ends it with its children when its time is over; its exit status (None: cut off), seconds,
    the end of what it wrote, and whether it failed: one that is cut off did where pytest, interrupted, counts failures.
    Of pytest also how many tests passed and which began last."""
    start = time.perf_counter()
    run = started(command, ROOT, environment)
    status, text = None, ""
    try:
        text = run.communicate(timeout=None if math.isinf(seconds) else max(0.0, seconds - GRACE))[0]
        status = run.returncode
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            text = run.communicate(timeout=min(GRACE, max(0.0, seconds)))[0]
    finally:
        end(run)
    if status is None and not text:  # it was deaf, too
        with contextlib.suppress(subprocess.TimeoutExpired):
            text = run.communicate(timeout=GRACE)[0]
    passed = re.search(r"\b(\d+) passed", text)
    begun = BEGUN.findall(text.split(" warnings summary ")[0])
    failed = status != 0 if status is not None else re.search(r"\b\d+ (failed|errors?)\b", text) is not None
    return {
        "status": status, "failed": failed, "seconds": round(time.perf_counter() - start, 1),
        "passed": int(passed[1]) if passed else 0, "last": begun[-1] if begun else None,
        "tail": text.splitlines()[-15:],
    }  # fmt: skip


# ---- all of it -------------------------------------------------------------------------------------------------------


class Record:
    """The JSON, replaced whole by each addition, and what is known of its failures."""

    def __init__(self, path: Path):
        self.path, self.result = path, dict[str, Any]()

    def add(self, **parts: Any) -> None:
        self.result |= parts
        replace_text(self.path, json.dumps(self.result, indent=1) + "\n")

    @property
    def failed(self) -> bool:
        commands = [*self.result.get("tests", {}).values(), *([self.result["build"]] if "build" in self.result else [])]
        ours = (row for row in self.result.get("rows", ()) if row["peer"].startswith("llmengine"))
        broken = self.result.get("broken", False) or any("error" in row for row in ours)
        return broken or any(done["failed"] for done in commands)


def build_and_test(given: argparse.Namespace, left: Callable[[], float], record: Record) -> bool:
    """What is not timed, within its part of the budget; whether there is something to time."""
    if not given.skip_build:
        install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        build = shell(install, min(BUILDING, left()))
        record.add(build=build)
        print("build:", build["status"], build["seconds"], "s")
        if build["status"] != 0:
            build["failed"] = True
            record.add(build=build)
            print("\n".join(build["tail"]))
            return False
    if not given.skip_tests:
        run_laws(min(TESTING, left() - TIMING), keep=lambda results: record.add(tests=results))
    return True


def draw(result: dict[str, Any], path: Path, title: str) -> None:
    """A picture of each operator, all in one file."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w") as pack:
        for operator in dict.fromkeys(row["operator"] for row in result["rows"]):
            chosen = [row for row in result["rows"] if row["operator"] == operator]
            picture = Path(folder) / f"{operator}.png"
            roofline.draw(chosen, ceilings_of(result["ceilings"]), picture, title)
            if picture.exists():
                pack.write(picture, picture.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks" / "results")))
    parser.add_argument("--seconds", type=float, default=BUDGET, help="budget of the whole command")
    parser.add_argument("--laws", choices=("slice", "all"), default="slice", help="all: every sample, nothing timed")
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--goals", action="store_true", help="the products that goals of ours name, and nothing else")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    given = parser.parse_args()
    start = time.perf_counter()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job passes on that it is ignored

    def left() -> float:
        return given.seconds - DRAWING - (time.perf_counter() - start)

    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # of the process that times
    elif not torch.cuda.is_available():
        print("gpu_suite: PyTorch sees no GPU here; --smoke runs the suite's own code on the CPU", file=sys.stderr)
        return 2
    if given.laws == "all":
        return int(any(done["failed"] for done in run_laws(math.inf, whole=True).values()))
    given.output.mkdir(parents=True, exist_ok=True)
    name = "smoke" if given.smoke else torch.cuda.get_device_name().lower().replace(" ", "-")
    record = Record(given.output / f"gpu_{name}{'_goals' if given.goals else ''}.json")
    if build_and_test(given, left, record):
        result = Times(left, lambda told: record.add(**told), given.smoke, goals=given.goals).all()
        try:
            if result["rows"]:
                draw(result, given.output / "plots.zip", f"{name}, {result['machine']['commit']}")
        except ImportError as error:
            print(f"no plots: {error}")
        print(result["cut"] or "")
    print(f"written: {record.path}")
    return int(record.failed)


if __name__ == "__main__":
    raise SystemExit(main())
