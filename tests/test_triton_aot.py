"""Triton kernels compiled ahead of time for GPUs that are not here: nothing spills, shared memory suffices."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "llmengine/backends/triton"
# The compiler and the interpreter exclude each other in one process.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)


def report(tmp_path: Path, *options: str) -> list[dict]:
    file = tmp_path / "aot.json"
    done = run("-m", "llmengine.backends.triton.aot", "--json", str(file), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


def test_the_first_call_of_every_operator_compiles(tmp_path):
    rows = report(tmp_path, "--quick", "--architectures", "sm_90", "gfx942")
    assert {row["architecture"] for row in rows} == {"sm_90", "gfx942"}
    for row in rows:
        assert row["registers"] > 0 and row["spilled"] == 0


def test_every_kernel_that_is_launched_is_compiled():
    """What the files launch, by their sources, against what the operators' `aot_calls` launch."""
    script = (
        "import torch; from llmengine.backends.triton import aot;"
        "print(*{launch.kernel() for operator in aot.OPERATORS"
        "        for _, made in aot.launches(operator, torch.float16, 'sm_90') for launch in made})"
    )
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    launched = set()
    for path in KERNELS.glob("*.py"):
        source = path.read_text()
        kernels = re.findall(r"^@triton\.jit\s*\ndef (\w+)", source, flags=re.M)
        launched |= {f"{path.stem}.{name}" for name in kernels if re.search(rf"\b{name}\[", source)}
    assert launched == set(done.stdout.split()), "an operator's file needs aot_calls, and aot.OPERATORS its name"


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles(architecture, dtype, tmp_path):
    assert report(tmp_path, "--architectures", architecture, "--dtypes", dtype)
