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
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def shell(command: list[str], seconds: float) -> dict[str, Any]:
    """Runs a command; its exit status (None: cut off), seconds and the end of what it wrote."""
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
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
        files = ["tests/test_ops.py", "tests/test_cuda_graphs.py"]
        laws = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", *files, "-k", "triton or cuda"]
        result["tests"] = shell(laws, max(10.0, min(200, left() - 150)))
        print("tests:", result["tests"]["status"], result["tests"]["seconds"], "s", *result["tests"]["tail"][-1:])

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
    return int(failed or result.get("tests", {}).get("status", 0) != 0)


if __name__ == "__main__":
    raise SystemExit(main())
