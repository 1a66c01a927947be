"""Tests in processes of their own, each with a package, an instruction set and an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from native_calls import NATIVE

ROOT = Path(__file__).resolve().parent.parent
SUITE = [
    "test_ops.py", "test_nan.py", "test_attention.py", "test_attention_extremes.py", "test_relative_attention.py",
    "test_decode_attention.py", "test_ffn.py", "test_linear.py", "test_linear_cross_entropy.py",
    "test_linear_cross_entropy_shard.py", "test_chain_field.py", "test_embedding.py", "optim/test_adamw.py",
    "optim/test_gradient_norm.py", "optim/test_main_grad.py",
]  # fmt: skip
OWN = "not triton"  # Triton's interpreter is the same on every instruction set, and slow


def run(command: list[str], timeout: float, directory: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A Python process of its own, with the package that lies in `directory`; a hang is a failure."""
    environment = {"PYTHONPATH": str(directory)} | environment
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=directory, timeout=timeout,
        env=os.environ | environment,
    )  # fmt: skip


def printed(script: str, timeout: float = 120, directory: Path = ROOT, **environment: str) -> str:
    """What a script prints in a process of its own; a crash is a failure."""
    done = run(["-c", script], timeout, directory, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def run_tests(file: str, expression: str, timeout: float, directory: Path = ROOT, **environment: str) -> None:
    """Runs the tests of a file that `expression` selects in a process of their own."""
    # by sys alone: what a sanitizer says goes to the process's own stderr before it ends it
    command = ["-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", str(ROOT / "tests" / file), "-k", expression]
    done = run(command, timeout, directory, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def laws(*tests: str) -> str:
    """Selects these tests of tests/test_ops.py for the operators that have kernels here, on this backend."""
    cases = " or ".join(f"[cpu-{name}{end}" for name in NATIVE for end in "-]")
    return f"({' or '.join(tests)}) and ({cases})"
