"""One command on a GPU: builds, runs the operator laws, times every operator beside PyTorch, writes JSON and plots.

    python benchmarks/gpu_suite.py [--output DIR] [--skip-build] [--skip-tests] [--seconds 460]

Cases, ceilings and percentages are those of `llmengine bench` (llmengine/roofline), once for each backend that can run
here. A case that fails is reported with its error and does not stop the rest; the budget in seconds cuts the list of
cases, not a case. --smoke runs tiny shapes on the CPU in Triton's interpreter: it proves the suite; its times mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


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

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "pytest", "-q", "--maxfail=20", *self.files, "-k", self.ids]


def laws(capability: tuple[int, int]) -> list[Laws]:
    """In their order: Triton's, which compile longest, last. What Hopper has of its own runs on Hopper."""
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
        Laws("triton", OPERATORS, "[triton-"),
    ]


def run_laws(seconds: float) -> dict[str, dict[str, Any]]:
    """Each has an equal share of the time, and what those before it have left of theirs."""
    end, results = time.perf_counter() + seconds, {}
    chosen = laws(torch.cuda.get_device_capability())
    for number, law in enumerate(chosen):
        share = (end - time.perf_counter()) / (len(chosen) - number)
        results[law.name] = done = shell(law.command, max(5.0, share), law.environment)
        print(f"tests, {law.name}:", done["status"], done["seconds"], "s", *done["tail"][-1:])
    return results


def shell(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a command; its exit status (None: cut off), seconds and the end of what it wrote."""
    start, env = time.perf_counter(), os.environ | (environment or {})
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=env)
        status, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as cut:
        status, text = None, (cut.stdout or b"").decode(errors="replace")
    return {"status": status, "seconds": round(time.perf_counter() - start, 1), "tail": text.splitlines()[-15:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks" / "results")))
    parser.add_argument("--seconds", type=float, default=460, help="budget of the whole command")
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
    given.output.mkdir(parents=True, exist_ok=True)
    device = "cpu" if given.smoke else "cuda"
    result: dict[str, Any] = {}
    if not given.skip_build:
        install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        result["build"] = shell(install, min(240, left()))
        print("build:", result["build"]["status"], result["build"]["seconds"], "s")
        if result["build"]["status"] != 0:
            print("\n".join(result["build"]["tail"]))
    if not given.skip_tests:
        result["tests"] = run_laws(min(200, left() - 150))

    sys.path.insert(0, str(ROOT))  # what was built above
    from llmengine import roofline
    from llmengine.ops.registry import load

    backends = [b for b in ("cuda", "triton") if load(b).unavailable is None]
    result["machine"] = machine = roofline.machine(device)
    result["backends"] = {b: load(b).unavailable or "usable" for b in ("cuda", "triton")}
    clock, dtype = roofline.Clock(device, 0.0), torch.float16 if given.smoke else torch.bfloat16
    ceilings = roofline.measure_ceilings(clock, [dtype], given.smoke)
    result["ceilings"] = ceilings.as_json()
    print(result["ceilings"])
    result["rows"] = rows = []
    operators = [name for name, (shapes, _) in roofline.OPERATORS.items() if roofline.SHAPES["cuda"][shapes]]
    if given.smoke:
        operators.remove("linear")  # Triton has none: on a GPU, CUDA's is timed
    for case in roofline.cases("small" if given.smoke else device, device, dtype, operators):
        if left() < 15:
            result["cut"] = f"the budget of {given.seconds:.0f} s ended before {case.operator} {case.name}"
            break
        measured = list(roofline.measure(case, clock, ceilings, backends=backends))
        rows += measured
        print("\n".join(roofline.lines(measured)))
    name = "smoke" if given.smoke else machine["device"].lower().replace(" ", "-")
    path = given.output / f"gpu_{name}_{machine['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for operator in {row["operator"] for row in rows}:
        chosen = [row for row in rows if row["operator"] == operator]
        roofline.draw(chosen, ceilings, given.output / f"gpu_{operator}.png", f"{name}, {machine['commit']}")
    print(result.get("cut", ""), f"written: {path}")
    failed = any("error" in row and row["peer"].startswith("llmengine") for row in rows)
    return int(failed or any(law["status"] != 0 for law in result.get("tests", {}).values()))


if __name__ == "__main__":
    raise SystemExit(main())
