"""Side-by-side benchmarks: every group times llmengine and its peer in one run, and the summary prints their ratio.

pytest benchmarks/ --benchmark-only                         all suites
pytest benchmarks/bench_norm.py --benchmark-only -k bf16    one of them
... --results benchmarks/results/cpu.json                   also write medians, ratios and the machine as JSON
... --device cpu                                            where a GPU would be taken
... --shapes small                                          cases of bench_roofline.py, which else a GPU alone has
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmengine.roofline import machine
from llmengine.roofline.clock import keep_freed_memory

SETTLING = 0.2  # seconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="write medians and ratios as JSON to this file")
    parser.addoption(
        "--shapes", choices=("small", "cpu", "cuda", "goals"), help="bench_roofline.py's; a GPU's where there is one"
    )
    parser.addoption("--device", choices=("cpu", "cuda"), help="where tensors lie; a GPU where there is one")


def device_of(config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def device(request):
    """Where a benchmark's tensors are made, unless it says so itself."""
    name = device_of(request.config)
    torch.set_default_device(None if name == "cpu" else name)
    if name == "cpu":
        keep_freed_memory()
    yield name
    torch.set_default_device(None)


@pytest.fixture(params=list(DTYPES))
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def side_by_side(benchmark, request, device):
    """Times `calls[peer]()`, on a GPU until it has done its work; the test is parametrised over `peer`, and groups by
    everything else."""

    def run(
        peer: str, calls: dict[str, Callable[[], object]], *, flops: float = 0.0, bytes_moved: float = 0.0,
        rounds: int = 7,
    ):  # fmt: skip
        """Compilation, where a call does that, falls into the rounds that are not counted. Quick calls have more of
        them: malloc takes a dozen until results lie where some lay before."""
        name = request.node.name
        benchmark.group = name.replace(f"{peer}-", "").replace(f"-{peer}", "")
        benchmark.extra_info |= {"peer": peer, "flops": flops, "bytes": bytes_moved}
        rounds = max(request.config.getoption("--benchmark-min-rounds"), rounds)
        torch.set_default_device(None)  # it takes time in every call of PyTorch
        call = calls[peer] if device == "cpu" else finished(calls[peer])
        begun = time.perf_counter()
        while time.perf_counter() - begun < SETTLING:
            call()
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=2)

    return run


def finished(call: Callable[[], object]) -> Callable[[], None]:
    """The call, and waiting for what it has launched."""

    def whole() -> None:
        call()
        torch.cuda.synchronize()

    return whole


def forward_backward(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Callable[[], None]:
    """A call that runs `function` on the tensors, and the backward of its (first) output with a random gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    sample = function(*leaves)
    grad = torch.randn_like(sample if isinstance(sample, torch.Tensor) else sample[0])

    def call() -> None:
        output = function(*leaves)
        output = output if isinstance(output, torch.Tensor) else output[0]
        torch.autograd.grad(output, leaves, grad if output.ndim else None)

    return call


def copies(x: torch.Tensor, written: int) -> Callable[[], None]:
    """A call that copies what an operator moves that writes so many tensors of x's size and reads one more: into new
    memory, as results are, and the half that is left into memory that there is."""
    half = x[: len(x) // 2]
    room = torch.empty_like(half)

    def call() -> None:
        for _ in range(written):
            x.clone()
        room.copy_(half)

    return call


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, object]] = {}
    for bench in getattr(session, "benchmarks", []):
        if "peer" in bench.extra_info:
            groups.setdefault(bench.group, {})[bench.extra_info["peer"]] = bench
    rows = [row for group, peers in groups.items() if (row := _row(group, peers))]
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("llmengine beside its peers (medians)")
    width = max(len(row["case"]) for row in rows)
    for row in rows:
        others = "  ".join(
            f"{peer}: {row['ms'][peer]:9.3f} ms = {ratio:5.2f}x" for peer, ratio in row["ratios"].items()
        )
        write(f"{row['case']:{width}}  llmengine: {row['ms']['llmengine']:9.3f} ms {_rate(row)}  {others}")
    write("(ratio: the peer's time over ours; above 1 llmengine is faster)")
    if path := config.getoption("--results"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(device_of(config)), "rows": rows}, indent=1) + "\n")
        write(f"written: {path}")


def _rate(row: dict) -> str:
    if row["gflops"]:
        return f"{row['gflops']:8.1f} GFLOP/s"
    return f"{row['gbytes']:8.1f} GB/s" if row["gbytes"] else ""


def _row(group: str, peers: dict) -> dict | None:
    if "llmengine" not in peers:
        return None
    seconds = {name: bench.stats.median for name, bench in peers.items()}
    ours, info = seconds["llmengine"], peers["llmengine"].extra_info
    row = {
        "case": group,
        "ms": {name: s * 1e3 for name, s in seconds.items()},
        "ratios": {name: s / ours for name, s in seconds.items() if name != "llmengine"},
        "gflops": info["flops"] / ours / 1e9,
        "gbytes": info["bytes"] / ours / 1e9,
    }
    if "floor_ms" in info:
        row["percent"] = {name: info["floor_ms"] / s / 10 for name, s in seconds.items()}
        row["peak_bytes"] = {name: bench.extra_info["peak_bytes"] for name, bench in peers.items()}
    return row
