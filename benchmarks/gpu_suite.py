"""One command on a GPU: builds, runs the operator laws, times every operator beside PyTorch, writes JSON and plots.

    python benchmarks/gpu_suite.py [--output DIR] [--skip-build] [--skip-tests] [--seconds 460]

Two ceilings are measured first, with PyTorch: a device-to-device copy and a bf16 matrix product. A case counts the
bytes that it must move and the operations that it must do; the larger of bytes / copy rate and operations / product
rate is its floor, and `percent` of that is reported beside the times. Every time is a median over device events, after
warm-up. A case that fails is reported with its error and does not stop the rest; the budget in seconds cuts the list of
cases, not a case. --smoke runs tiny shapes on the CPU in Triton's interpreter: it proves the suite; its times mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PEER_ERRORS = (RuntimeError, NotImplementedError, torch.cuda.OutOfMemoryError)
functional: Any = None  # llmengine.functional, imported when it is built


@dataclass
class Case:
    """A call of an operator and its peers' on equal tensors. `run[name]()` gives the (first) output."""

    operator: str
    name: str
    run: dict[str, Callable[..., torch.Tensor]]
    tensors: list[torch.Tensor]
    bytes_moved: float
    flops: float = 0.0
    backward_bytes: float = 0.0
    backward_flops: float = 0.0


# ---- cases -----------------------------------------------------------------------------------------------------------


def cases(device: str, smoke: bool) -> Iterator[Case]:
    """The order is that of what matters most, should the budget cut it."""
    dtype = torch.float16 if smoke else torch.bfloat16
    small = {"attention": [(1, 2, 40, 16)], "rows": [(5, 48)], "logits": [(6, 50)], "head": [(8, 16, 40)],
             "ffn": [(8, 16, 32)]}  # fmt: skip
    full = {
        "attention": [(4, 16, 2048, 128), (2, 16, 8192, 128), (4, 32, 2048, 64)],
        "rows": [(8192, 768), (8192, 4096), (4096, 16384)],
        "logits": [(8192, 32768), (8192, 131072)],
        "head": [(8192, 4096, 32768)],
        "ffn": [(8192, 1024, 4096), (8192, 4096, 16384)],
    }
    shapes = small if smoke else full

    def randn(*shape, scale=1.0):
        return torch.randn(shape, device=device, dtype=torch.float32).mul_(scale).to(dtype)

    for shape in shapes["attention"]:
        for causal in (False, True):
            yield _attention(shape, causal, randn)
    for shape in shapes["rows"]:
        yield from _rows(shape, randn)
    for shape in shapes["logits"]:
        yield from _logits(shape, randn, device)
    for shape in shapes["head"]:
        yield _head(shape, randn, device)
    for shape in shapes["ffn"]:
        yield _ffn(shape, randn)


def _attention(shape, causal: bool, randn) -> Case:
    batch, heads, length, head_dim = shape
    q, k, v = (randn(*shape) for _ in range(3))
    kernels = torch.nn.attention.SDPBackend

    def sdpa(which=None):
        def call(q, k, v):
            if which is None:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            with torch.nn.attention.sdpa_kernel(which):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    peers = {"torch": sdpa()}
    if q.is_cuda:
        peers |= {"torch flash": sdpa(kernels.FLASH_ATTENTION), "cudnn": sdpa(kernels.CUDNN_ATTENTION)}
    flops = 4 * batch * heads * length * length * head_dim * (0.5 if causal else 1.0)
    size = q.numel() * q.element_size()
    return Case(
        "attention", f"{'x'.join(map(str, shape))} {'causal' if causal else 'full'}",
        {"llmengine": lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal), **peers},
        [q, k, v], 4 * size, flops, 8 * size, 2.5 * flops,
    )  # fmt: skip


def _rows(shape, randn) -> Iterator[Case]:
    x, residual, w, b = randn(*shape), randn(*shape), randn(shape[1]), randn(shape[1])
    size, line, name = x.numel() * x.element_size(), shape[1:], "x".join(map(str, shape))
    t = torch.nn.functional
    yield Case(
        "layer_norm", name,
        {
            "llmengine": lambda x, w, b: functional.layer_norm(x, line, w, b),
            "torch": lambda x, w, b: t.layer_norm(x, line, w, b),
        },
        [x, w, b], 2 * size, 0, 3 * size,
    )  # fmt: skip
    yield Case(
        "rms_norm", name,
        {"llmengine": lambda x, w: functional.rms_norm(x, line, w), "torch": lambda x, w: t.rms_norm(x, line, w)},
        [x, w], 2 * size, 0, 3 * size,
    )  # fmt: skip
    yield Case(
        "add_layer_norm", name,
        {
            "llmengine": lambda x, r, w, b: functional.add_layer_norm(x, r, line, w, b)[0],
            "torch": lambda x, r, w, b: t.layer_norm(x + r, line, w, b),
        },
        [x, residual, w, b], 4 * size, 0, 3 * size,
    )  # fmt: skip
    yield Case(
        "softmax", name,
        {"llmengine": lambda x: functional.softmax(x, -1), "torch": lambda x: torch.softmax(x, -1)},
        [x], 2 * size, 0, 3 * size,
    )  # fmt: skip


def _logits(shape, randn, device) -> Iterator[Case]:
    x = randn(*shape)
    target = torch.randint(shape[1], (shape[0],), device=device)
    size = x.numel() * x.element_size()
    for smoothing in (0.0, 0.1):

        def both(room, smoothing=smoothing):
            return lambda x: room.cross_entropy(x, target, label_smoothing=smoothing)

        yield Case(
            "cross_entropy", f"{'x'.join(map(str, shape))} smoothing {smoothing}",
            {"llmengine": both(functional), "torch": both(torch.nn.functional)}, [x], size, 0, 2 * size,
        )  # fmt: skip


def _head(shape, randn, device) -> Case:
    tokens, d_model, classes = shape
    x, w = randn(tokens, d_model), randn(classes, d_model, scale=d_model**-0.5)
    target = torch.randint(classes, (tokens,), device=device)
    flops = 2.0 * tokens * d_model * classes
    size = (x.numel() + w.numel()) * x.element_size()
    t = torch.nn.functional
    return Case(
        "linear_cross_entropy", "x".join(map(str, shape)),
        {
            "llmengine": lambda x, w: functional.linear_cross_entropy(x, w, target),
            "torch": lambda x, w: t.cross_entropy(t.linear(x, w), target),
        },
        [x, w], size, flops, 2 * size, 2 * flops,
    )  # fmt: skip


def _ffn(shape, randn) -> Case:
    tokens, d_model, d_ff = shape
    x, up, down = (
        randn(tokens, d_model),
        randn(d_ff, d_model, scale=d_model**-0.5),
        randn(d_model, d_ff, scale=d_ff**-0.5),
    )
    b_up, b_down = randn(d_ff), randn(d_model)
    flops = 4.0 * tokens * d_model * d_ff
    size = (2 * x.numel() + 2 * up.numel()) * x.element_size()
    t = torch.nn.functional
    return Case(
        "ffn", "x".join(map(str, shape)),
        {
            "llmengine": lambda x, u, bu, d, bd: functional.ffn(x, u, d, b_up=bu, b_down=bd, activation="gelu_tanh"),
            "torch": lambda x, u, bu, d, bd: t.linear(t.gelu(t.linear(x, u, bu), approximate="tanh"), d, bd),
        },
        [x, up, b_up, down, b_down], size, flops, 2 * size, 2 * flops,
    )  # fmt: skip


# ---- timing ----------------------------------------------------------------------------------------------------------


class Clock:
    """Medians in milliseconds: device events on a GPU (triton.testing.do_bench), the host's clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def median(self, call: Callable[[], Any]) -> float:
        if self.device == "cuda":
            import triton.testing

            return float(triton.testing.do_bench(call, warmup=15, rep=60, return_mode="median"))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    def peak_memory(self, call: Callable[[], Any]) -> int:
        """Bytes that a call holds at once beyond what is there before it."""
        if self.device != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def ceilings(clock: Clock, smoke: bool) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and TFLOP/s of a bf16 product of random matrices."""
    n, m = (1 << 12, 64) if smoke else (1 << 29, 8192)
    source = torch.empty(n, dtype=torch.bfloat16, device=clock.device).normal_()
    target = torch.empty_like(source)
    copy = clock.median(lambda: target.copy_(source))
    a, b = (torch.randn(m, m, device=clock.device).bfloat16() for _ in range(2))
    product = clock.median(lambda: a @ b)
    return {"gbytes_per_s": 4 * n / copy / 1e6, "tflops": 2 * m**3 / product / 1e9}


def measure(case: Case, backends: list[str], clock: Clock, ceiling: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row per peer and pass."""
    import llmengine

    for peer, function in case.run.items():
        for backend in backends if peer == "llmengine" else [None]:
            name = peer if backend is None else f"llmengine {backend}"
            row = {"operator": case.operator, "case": case.name, "peer": name}
            try:
                if backend is None:
                    yield from _passes(row, case, function, clock, ceiling)
                else:
                    with llmengine.backend(backend):
                        yield from _passes(row, case, function, clock, ceiling)
            except PEER_ERRORS as error:
                yield row | {"error": str(error).splitlines()[0][:300]}


def _passes(row, case: Case, function, clock: Clock, ceiling) -> Iterator[dict[str, Any]]:
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    output = function(*leaves)
    upstream = torch.randn_like(output)
    del output

    def forward():
        with torch.no_grad():
            return function(*leaves)

    def both():
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    for which, call, extra in (("forward", forward, 0), ("forward + backward", both, 1)):
        moved = case.bytes_moved + extra * case.backward_bytes
        flops = case.flops + extra * case.backward_flops
        floor = max(moved / ceiling["gbytes_per_s"] / 1e6, flops / ceiling["tflops"] / 1e9)
        ms = clock.median(call)
        yield row | {
            "pass": which, "ms": ms, "gbytes_per_s": moved / ms / 1e6, "tflops": flops / ms / 1e9,
            "percent": 100 * floor / ms, "peak_bytes": clock.peak_memory(call),
        }  # fmt: skip


# ---- the command -----------------------------------------------------------------------------------------------------


def shell(command: list[str], seconds: float) -> dict[str, Any]:
    """Runs a command; its exit status (None: cut off), seconds and the end of what it wrote."""
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        status, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as cut:
        status, text = None, (cut.stdout or b"").decode(errors="replace")
    return {"status": status, "seconds": round(time.perf_counter() - start, 1), "tail": text.splitlines()[-15:]}


def plots(rows: list[dict[str, Any]], folder: Path) -> None:
    """A PNG per operator: percent of the floor, forward + backward, by case and peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.get("pass") == "forward + backward"]
    for operator in sorted({row["operator"] for row in timed}):
        ours = [row for row in timed if row["operator"] == operator]
        names, peers = (list(dict.fromkeys(row[key] for row in ours)) for key in ("case", "peer"))
        figure, axes = pyplot.subplots(figsize=(max(6, 1.6 * len(names)), 4), layout="constrained")
        for i, peer in enumerate(peers):
            percent = {row["case"]: row["percent"] for row in ours if row["peer"] == peer}
            places = [j + (i - (len(peers) - 1) / 2) * 0.8 / len(peers) for j in range(len(names))]
            axes.bar(places, [percent.get(name, 0.0) for name in names], 0.8 / len(peers), label=peer)
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axes.set(ylabel="% of the measured floor", title=f"{operator}, forward + backward")
        axes.legend()
        figure.savefig(folder / f"gpu_{operator}.png", dpi=110)
        pyplot.close(figure)


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        head = f"{row['operator']:22}{row['case']:34}{row['peer']:18}"
        if "error" in row:
            lines.append(f"{head}{row['error'][:80]}")
        else:
            rate = f"{row['tflops']:8.1f} TFLOP/s" if row["tflops"] else f"{row['gbytes_per_s']:8.0f} GB/s   "
            lines.append(f"{head}{row['pass']:20}{row['ms']:9.3f} ms {rate} {row['percent']:6.1f} %")
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts = {"commit": commit.stdout.strip(), "torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
                  "memory": p.total_memory, "cuda": torch.version.cuda}  # fmt: skip
    return facts


def main() -> int:
    global functional
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
    result: dict[str, Any] = {"machine": machine(device)}
    if not given.skip_build:
        install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        result["build"] = shell(install, min(240, left()))
        print("build:", result["build"]["status"], result["build"]["seconds"], "s")
        if result["build"]["status"] != 0:
            print("\n".join(result["build"]["tail"]))
    if not given.skip_tests:
        laws = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", "tests/test_ops.py", "-k", "triton or cuda"]
        result["tests"] = shell(laws, max(10.0, min(200, left() - 150)))
        print("tests:", result["tests"]["status"], result["tests"]["seconds"], "s", *result["tests"]["tail"][-1:])

    sys.path.insert(0, str(ROOT))
    from llmengine import functional as built
    from llmengine.ops.registry import load

    functional = built
    backends = [b for b in ("cuda", "triton") if load(b).unavailable is None]
    result["backends"] = {b: load(b).unavailable or "usable" for b in ("cuda", "triton")}
    clock = Clock(device)
    result["ceilings"] = ceiling = ceilings(clock, given.smoke)
    result["rows"] = rows = []
    for case in cases(device, given.smoke):
        if left() < 15:
            result["cut"] = f"the budget of {given.seconds:.0f} s ended before {case.operator} {case.name}"
            break
        rows += measure(case, backends, clock, ceiling)
    name = "smoke" if given.smoke else result["machine"]["device"].lower().replace(" ", "-")
    path = given.output / f"gpu_{name}_{result['machine']['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plots(rows, given.output)
    print(f"copy {ceiling['gbytes_per_s']:.0f} GB/s, bf16 product {ceiling['tflops']:.0f} TFLOP/s")
    print(table(rows))
    print(result.get("cut", ""), f"written: {path}")
    failed = any("error" in row and row["peer"].startswith("llmengine") for row in rows)
    return int(failed or result.get("tests", {}).get("status", 0) != 0)


if __name__ == "__main__":
    raise SystemExit(main())
