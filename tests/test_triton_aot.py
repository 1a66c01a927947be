"""Triton kernels compiled ahead of time for GPUs that are not here: nothing spills, shared memory suffices, and none
takes more than tests/triton_budget.json says (`python -m llmengine.backends.triton.aot --budget` writes it anew)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "llmengine/backends/triton"
PACKAGE = "llmengine.backends.triton."
BUDGET = json.loads((ROOT / "tests/triton_budget.json").read_text())
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("float32", "bfloat16", "float16")
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
    assert all(row["registers"] > 0 and row["spilled"] == 0 for row in rows)
    for row in rows:
        call = f"{row['operator']}, {row['call']}"
        taken = {row["kernel"]: [row[field] for field in ("num_warps", "registers", "spilled", "shared")]}
        assert not over_budget({call: taken}, BUDGET[row["architecture"]][row["dtype"]])


def over_budget(taken: dict, allowed: dict) -> dict:
    """Of (call, kernel), what is more than allowed."""
    if triton.__version__ != BUDGET["triton"]:
        pytest.skip(f"Triton is {triton.__version__}, and what the budget holds was compiled by {BUDGET['triton']}")
    pairs = {(call, kernel): (taken[call][kernel], allowed[call][kernel]) for call in taken for kernel in taken[call]}
    return {names: (t, a) for names, (t, a) in pairs.items() if any(x > y for x, y in zip(t, a, strict=True))}


LAUNCHES = """
import json, torch
from llmengine.backends.triton import aot, attention_table, tiles, tuned
asked, lookup = set(), tuned.tile
def tile(slot, *rest):
    asked.add((architecture, slot))
    return lookup(slot, *rest)
tuned.tile = tile
launches, slots = [], []
for architecture in aot.ARCHITECTURES:
    for dtype in ("float32", "bfloat16", "float16"):
        for operator in aot.OPERATORS:
            for call, made in aot.launches(operator, getattr(torch, dtype), architecture):
                launches += [(architecture, dtype, f"{operator}, {call}", launch.kernel()) for launch in made]
    slots += [(architecture, attention_table.slot(operands, kernel, widest))
              for operands, kernels in attention_table.table(architecture).items()
              for kernel, tiles_of in kernels.items() for widest in tiles_of]
    slots += [(architecture, tiles.slot(kind, dtype, index)) for dtype in (torch.float32, torch.float16)
              for kind, found in tiles.table(architecture, dtype).items() for index in range(len(found))]
limits = {name: architecture.shared_limit for name, architecture in aot.ARCHITECTURES.items()}
print(json.dumps({"launches": launches, "limits": limits, "slots": slots, "asked": sorted(asked)}))
"""


@pytest.fixture(scope="module")
def ahead() -> dict:
    """What is launched, the architectures' limits, the places of the tables, and those that launches ask for."""
    done = run("-c", LAUNCHES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_place_in_the_tables_of_tiles_is_compiled(ahead):
    asked = set(map(tuple, ahead["asked"]))
    assert {slot.split()[0] for _, slot in asked} == {"attention", "products", "rows", "relative"}
    missing = set(map(tuple, ahead["slots"])) - asked
    assert len(ahead["slots"]) > 150 and not missing, "a tile that no call of aot_calls has"


def test_the_budget_holds_what_is_launched_and_no_spill(ahead):
    launches, limits = ahead["launches"], ahead["limits"]
    held = [
        (architecture, dtype, call, kernel)
        for architecture in ARCHITECTURES
        for dtype, calls in BUDGET.get(architecture, {}).items()
        for call, kernels in calls.items()
        for kernel in kernels
    ]
    assert set(held) == set(map(tuple, launches))
    for architecture, dtype, call, kernel in held:
        _, registers, spilled, shared = BUDGET[architecture][dtype][call][kernel]
        assert registers and not spilled and shared <= limits[architecture], (architecture, dtype, call, kernel)


def test_what_a_gpu_does_not_have_is_a_problem():
    script = """
import dataclasses
from llmengine.backends.triton.aot import Compiled
row = Compiled("", "", "", "float16", "sm_100", {}, 8, 255, 0, 232448, 512, None, 1.0)
for change in ({}, {"spilled": 8}, {"shared": 232449}, {"tensor_memory": 513}):
    print(dataclasses.replace(row, **change).problem())
"""
    assert run("-c", script).stdout.splitlines() == [
        "None",
        "8 bytes a thread are spilled",
        "232449 bytes of shared memory, allowed: 232448",
        "513 columns of tensor memory, allowed: 512",
    ]


def test_products_of_float32_are_compiled_for_tf32_too(ahead):
    calls = {call for _, dtype, call, _ in ahead["launches"] if call.endswith("TF32") and dtype == "float32"}
    operators = {"attention", "ffn", "linear_cross_entropy", "relative_attention"}
    assert {call.partition(",")[0] for call in calls} == operators
    script = """
import torch
from llmengine.backends.triton import aot
for architecture in ("sm_80", "gfx942"):
    for name, (launch, *_) in aot.launches("relative_attention", torch.float32, architecture):
        print(name.endswith("TF32"), launch.args[-1].precision.value)
"""
    told = set(run("-c", script).stdout.splitlines())
    assert told == {"True tf32", "False ieee"}


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
import torch
from llmengine.backends.triton import aot, device
from llmengine.backends.triton.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from llmengine.testing.memory import Peak

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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_within_its_budget(architecture, dtype, tmp_path):
    file = tmp_path / "budget.json"
    assert report(tmp_path, "--architectures", architecture, "--dtypes", dtype, "--budget", str(file))
    taken, allowed = json.loads(file.read_text())[architecture][dtype], BUDGET.get(architecture, {}).get(dtype, {})
    missing = {call: kernels.keys() - allowed.get(call, {}).keys() for call, kernels in taken.items()}
    assert not any(missing.values()), "`python -m llmengine.backends.triton.aot --budget` puts them into the budget"
    assert not over_budget(taken, allowed)
