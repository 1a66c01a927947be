"""Triton kernels compiled ahead of time for GPUs that are not here: nothing spills, shared memory suffices."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "llmengine/backends/triton"
PACKAGE = "llmengine.backends.triton."
# The compiler and the interpreter exclude each other in one process.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)


def report(tmp_path: Path, *options: str) -> list[dict]:
    file = tmp_path / "aot.json"
    done = run("-m", "llmengine.backends.triton.aot", "--json", str(file), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


def launched_kernels(path: Path) -> set[str]:
    """As file.function: jitted functions that Python names, to launch them or to hand them to what does, be they the
    file's own or imported. Those that only jitted functions name are parts of kernels."""
    tree = ast.parse(path.read_text())
    kernels = {name: f"{path.stem}.{name}" for name in jitted_functions(tree)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            file = node.module.removeprefix(PACKAGE)
            theirs = jitted_functions(ast.parse((KERNELS / f"{file}.py").read_text()))
            kernels |= {name.asname or name.name: f"{file}.{name.name}" for name in node.names if name.name in theirs}
    jitted = jitted_functions(tree).values()
    nodes = (node for statement in tree.body if statement not in jitted for node in ast.walk(statement))
    return {kernels[node.id] for node in nodes if isinstance(node, ast.Name) and node.id in kernels}


def jitted_functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return {f.name: f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


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
    launched = set().union(*map(launched_kernels, KERNELS.glob("*.py")))
    assert launched == set(done.stdout.split()), "an operator's file needs aot_calls, and aot.OPERATORS its name"


PEAK = """
import weakref, torch
from torch.utils._python_dispatch import TorchDispatchMode
from llmengine.backends.triton import aot, device
from llmengine.backends.triton.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward

class Peak(TorchDispatchMode):
    def __init__(self, *given):
        super().__init__()
        self.live, self.most = {tensor.untyped_storage()._cdata: 0 for tensor in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.most = max(self.most, sum(self.live.values()))
        return results

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

x, w, target = empty(8192, 4096), empty(128256, 4096), empty(8192, dtype=torch.int64)
options = ("mean", -100, 0.0, 0.0, 0.0)
peak = Peak(x, w, target)
with aot._recording([]), device.assume("sm_90"), peak:
    loss, lse, normaliser = linear_cross_entropy_forward(x, w, None, target, None, *options)
    gradients = linear_cross_entropy_backward(
        loss, x, w, None, target, None, lse, normaliser, *options, 0.0, None, [True, True, False]
    )
print(peak.most, sum(g.nbytes for g in gradients))
"""


def test_linear_cross_entropy_takes_under_2_percent_of_the_unfused_paths_memory():
    """Beyond its gradients, which both have: there, logits in bfloat16, their softmax and their gradient."""
    done = run("-c", PEAK)
    assert done.returncode == 0, done.stderr
    most, gradients = map(int, done.stdout.split())
    assert most > gradients > 2 * 4096 * 128256
    assert most - gradients < 0.02 * 3 * 2 * 8192 * 128256


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles(architecture, dtype, tmp_path):
    assert report(tmp_path, "--architectures", architecture, "--dtypes", dtype)
