"""The rules of ARCHITECTURE.md, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmengine"
# A room may import from the rooms to its right (and from itself).
ROOMS = (
    "cli roofline integrations training tasks objectives data metrics models convert nn optim functional ops backends"
).split()
PYTHON = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
PYTHON_LINES, NATIVE_LINES = 450, 650


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "llmengine" and parts[1] in ROOMS else None


def imports(tree: ast.AST) -> list[str]:
    """Every imported module; `from llmengine import nn` counts as llmengine.nn."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def code_of(path: Path) -> str:
    """A native file without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_imports_point_downward(path: Path):
    module = "llmengine." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    own = room(module)
    if own is None:
        return
    allowed = set(ROOMS[ROOMS.index(own) :])
    # backends enter their kernels into the registry's tables; the registry loads backends by name, when asked
    if own == "backends":
        allowed.add("ops")
    for name in imports(ast.parse(path.read_text())):
        target = room(name)
        assert target is None or target in allowed, f"{relative(path)} ({own}) imports {name}: upward"
        if own == "backends" and target == "ops":
            assert name.startswith("llmengine.ops.registry"), f"{relative(path)}: backends know only the registry"


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_each_thing_stays_in_its_room(path: Path):
    source = path.read_text()
    tree = ast.parse(source)
    where = path.relative_to(PACKAGE).parts[0]
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    if where not in ("backends",):
        assert "data_ptr" not in names, "data_ptr belongs to backends/"
    if where not in ("ops", "testing"):
        assert "Library" not in names and "custom_op" not in names, "torch.library belongs to ops/"
        assert "Function" not in names, "autograd.Function belongs to ops/"
    assert not calls & {"eval", "exec"}
    modules = {name.split(".")[0] for name in imports(tree)}
    assert not modules & {"pickle", "urllib", "requests", "huggingface_hub"}, "no pickle, no network"
    assert "torch.save(" not in source, "checkpoints are safetensors"
    loads = re.findall(r"torch\.load\([^)]*\)", source)
    assert not loads or relative(path) == "llmengine/convert/foreign.py", "checkpoints are safetensors"
    assert all("weights_only=True" in load for load in loads), "nothing that a file asks for is run"


@pytest.mark.parametrize("path", NATIVE, ids=relative)
def test_native_rooms(path: Path):
    code, where = code_of(path), path.relative_to(ROOT / "csrc").parts[0]
    includes = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', code)
    for name in includes:
        assert not name.startswith(("torch/", "ATen/", "c10/")), "no PyTorch header in csrc"
        if where != "bindings":
            assert not name.startswith("pybind11") and name != "Python.h", "Python belongs to bindings/"
        if where == "cpu":
            assert not name.startswith("cuda"), "cpu/ does not include cuda/"
        if where in ("cuda", "sim"):
            assert not name.startswith("cpu/"), "cuda/ does not include cpu/"
        if where == "cuda":
            assert not name.startswith("sim/"), "kernels do not know the simulator"
    if where == "cuda":
        copies = re.findall(r"\bmem(?:cpy|set|move)\b", code)
        assert not copies, "the simulator does not see what the C library copies: kernels copy by assignment"
        launches = set(re.findall(r"\bcudaLaunch(?:Cooperative)?Kernel\w*|<<<", code))
        assert not launches or path.name == "launch.cuh", "kernels are launched by cuda/launch.cuh alone"
        assert not re.search(r"\bcuLaunch", code) or path.name == "compiled.cu", "compiled ones by cuda/compiled.cu"
    if "ptx" not in path.parts:
        # an empty template with a clobber emits no instruction: a compiler fence, allowed where it is needed
        for template in re.findall(r'\basm\s*(?:volatile)?\s*\(\s*"([^"]*)"', code):
            assert template == "", "inline assembly belongs to cuda/ptx/"
    for macro in re.findall(r"#\s*define\s+(\w+)\(", code):
        # a word of CUDA's language that takes arguments can be nothing but a macro where a C++ compiler reads it
        assert where == "sim" and macro == "__launch_bounds__", f"function-like macro {macro}"


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=relative)
def test_files_are_read_in_one_sitting(path: Path):
    limit = PYTHON_LINES if path.suffix == ".py" else NATIVE_LINES
    assert len(path.read_text().splitlines()) <= limit, "a file that outgrows a sitting is two ideas: split it"


def test_import_is_light():
    """`import llmengine` needs no GPU, Triton, transformers, nor any of the libraries that only the program uses."""
    heavy = ("triton", "transformers", "typer", "rich", "matplotlib", "pydantic", "tokenizers", "safetensors", "yaml")
    script = (
        "import torch, sys; before = set(sys.modules); import llmengine;"
        f"print([m for m in {heavy!r} if m in set(sys.modules) - before])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


def test_every_operator_bears_its_name_in_every_room():
    for path in (PACKAGE / "ops").glob("*.py"):
        if path.stem in ("__init__", "registry"):
            continue
        for other in ("backends/reference", "backends/cpu", "testing/samples"):
            if path.stem.startswith("fp8_") and other == "backends/cpu":
                continue  # no processor multiplies 8-bit floats: there the reference shows what they do
            assert (PACKAGE / other / path.name).exists(), f"{path.stem} is missing in {other}"
        doors = [(PACKAGE / door / path.name).exists() for door in ("functional", "optim")]
        assert sum(doors) == 1, f"{path.stem} is missing in functional, or, where it changes its arguments, in optim"


@pytest.mark.parametrize("path", sorted((PACKAGE / "backends/triton").glob("*.py")), ids=relative)
def test_tritons_kernels_give_equal_bits_and_search_nothing_at_run_time(path: Path):
    assert not unequal_or_searched(path.read_text())


def unequal_or_searched(source: str) -> set[str]:
    """Atomic operations and autotuners, as whatever of a module's or by whatever name they are called."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names |= set(node.name.split("."))
    return {name for name in names if name.startswith("atomic") or "autotune" in name.lower()}


def test_atomics_and_autotuners_are_seen_however_they_are_called():
    for source in (
        "tl.atomic_add(p, x)",
        "from triton.language import atomic_add",
        "from triton.language import atomic_add as plus",
        "from triton.language import *\natomic_add(p, x)",
        "import triton.runtime.autotuner",
        "@autotune(configs)\ndef f(): pass",
    ):
        assert unequal_or_searched(source), source
    assert not unequal_or_searched("tl.store(p, tl.load(p) + x)")
