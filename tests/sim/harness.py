"""What the tests of kernels in the simulator share: comparison by the law under all schedules, and kernels of which one
line is broken."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine.backends import cuda_sim
from llmengine.ops import registry
from llmengine.testing import assert_law, simulator
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.simulator import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Schedules of case_runs.h, in order.
RUNS = [*SCHEDULES[:3], *["random"] * 4, "starved"]
# kernel file, file to break, line, what it becomes, what must be said: a wrong result, or what the simulator found
Break = tuple[str, str, str, str, str]


def schedule(request: pytest.FixtureRequest) -> None:
    """A schedule of the simulator for a test, and the simulator; a case on a GPU wants neither."""
    case = getattr(request.node, "callspec", None)
    if case is None or "cuda" not in [x for x in case.params.values() if isinstance(x, str)]:
        simulator.prepare(request.node.name, SCHEDULES[:4])  # the fifth is for kernels, not for mistakes in them


def places() -> list[str]:
    """Backends that have the kernels: the simulator, and the GPU where there is one."""
    return ["cuda_sim", *(["cuda"] if registry.load("cuda").unavailable is None else [])]


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def on_hopper() -> bool:
    return "cuda" in places() and torch.cuda.get_device_capability() == (9, 0)


def places_of_products() -> list[tuple[str, str]]:
    """(backend, whose kernels multiply) of operators that have products of their own: in the simulator, and on a GPU
    where there is one."""
    cores = {"cuda_sim": ("sm80", "sm90a"), "cuda": ("sm80", "sm90a") if on_hopper() else ("sm80",)}
    return [(backend, core) for backend in places() for core in cores[backend]]


def check(call, leaves: list[Tensor], native=None, schedules=SCHEDULES, plain_call=None) -> None:
    """`call(*leaves)` and its gradients on cuda_sim, by the law; equal bits under the schedules.

    plain_call: the same in PyTorch's own operators; without it the reference backend is the peer in precision.
    """

    def run(call, backend: str, *tensors: Tensor) -> list[Tensor]:
        given = [t.detach().requires_grad_() for t in tensors]
        torch.manual_seed(3)
        with llmengine.backend(backend):
            y = call(*given)
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
            return [y.detach(), *torch.autograd.grad(y, given, upstream.to(y.dtype))]

    oracle = run(call, "reference", *(t.double() for t in leaves))
    plain = run(plain_call or call, "reference", *leaves)
    first = None
    for order in schedules:
        if native is not None:
            native.set_schedule(order, 7)
        found = run(call, "cuda_sim", *leaves)
        first = first or found
        for i, (y, p, o) in enumerate(zip(found, plain, oracle, strict=True)):
            assert_law(y, p, o, GRADIENT if i else OUTPUT, f"{order}: {i}")
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), order


def assert_caught(broken: Break, attempt: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That `attempt`, which passes on whole kernels, fails as it must where one line is broken."""
    source, file, line, becomes, said = broken
    module = built_with(source, file, line, becomes, folder)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, folder.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        attempt()


def built_with(
    source: str, file: str, line: str, broken: str, folder: Path, also: tuple[tuple[str, str], ...] = ()
) -> Path:
    """`_cuda_sim` with one kernel file compiled anew, a line of it or of a header broken; `also` is changed besides."""
    text = (ROOT / "csrc/cuda" / file).read_text()
    changed = folder / "cuda" / file
    changed.parent.mkdir(exist_ok=True)
    for part, becomes in ((line, broken), *also):
        assert part in text, "the line to break has changed: change this test with it"
        text = text.replace(part, becomes, 1)
    changed.write_text(text)
    compiled = changed if file == f"{source}.cu" else ROOT / f"csrc/cuda/{source}.cu"
    built = simulator.build("_cuda_sim")
    parts = (built / "CMakeFiles" / f"{part}.dir" for part in ("_cuda_sim", "simulated_kernels"))
    objects = [o for part in parts for o in part.rglob("*.o")]
    (replaced,) = (o for o in objects if o.name == f"{source}.cu.o")
    own = folder / "own.o"
    options = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fsanitize=thread"]
    includes = [f"-I{path}" for path in (folder, ROOT / "csrc/sim/include", ROOT / "csrc")]
    subprocess.run(["c++", *options, "-w", *includes, "-x", "c++", "-c", compiled, "-o", own], check=True)
    module = folder / f"_cuda_sim{sysconfig.get_config_var('EXT_SUFFIX')}"
    others = [o for o in objects if o != replaced]
    link = ["c++", "-shared", own, *others, built / "libsimulator.a", "-ldl", "-o", module]
    subprocess.run(link, check=True)
    return module


def loaded(module: Path, name: str):
    """Under a name of its own: pybind11 would put the functions into the module that already has it."""
    loader = importlib.machinery.ExtensionFileLoader(f"{name}._cuda_sim", str(module))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    fresh = importlib.util.module_from_spec(spec)
    loader.exec_module(fresh)
    return fresh
