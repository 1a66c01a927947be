"""Times of a case, ours beside its peers', as rows of a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import llmengine
from llmengine.roofline.cases import BOTH, Case
from llmengine.roofline.ceilings import NAMES, Ceilings
from llmengine.roofline.choices import Within
from llmengine.roofline.clock import Clock
from llmengine.roofline.peers import FLEX

# operator, case, dtype, peer, pass; ms, tflops, gbytes_per_s, percent, limit, peak_bytes, sm_mhz or error
Row = dict[str, Any]
PEER_ERRORS = (Exception,)  # those of PyTorch, of its compiler and of Triton share no other class
COMPILED = "torch.compile"


def measure(
    case: Case,
    clock: Clock,
    ceilings: Ceilings,
    *,
    backends: Sequence[str] = (),
    compiled: bool = False,
    wanted: Callable[[str, str], bool] = lambda which, peer: True,
) -> Iterator[Row]:
    """A row per peer and pass. A peer that fails gives a row with its error.

    Args:
        backends: a row "llmengine NAME" for each; without any, "llmengine" is what the registry picks.
        compiled: also what PyTorch's compiler makes: "torch.compile" of PyTorch's call, and FlexAttention.
        wanted: whether to run a peer in a pass; it is asked just before the peer is called.
    """
    torch._dynamo.reset()  # else the tenth shape of a call would not be compiled any more
    runs: dict[str, Callable[..., Tensor]] = {}
    for name, function in case.run.items():
        ours = {f"llmengine {backend}": _demanding(backend, function) for backend in backends}
        if name != FLEX or compiled:
            runs |= ours if ours and name == "llmengine" else {name: function}
    if compiled and case.tensors:
        runs[COMPILED] = torch.compile(case.run["torch"])
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    for which in case.passes:
        groups = [{name: function} for name, function in runs.items()] if clock.alone else [runs]
        for group in groups:
            chosen = {
                name: function for name, function in group.items() if has(function, which) and wanted(which, name)
            }
            yield from _pass(case, which, chosen, leaves, clock, ceilings)


def has(peer: Callable[..., Tensor], which: str) -> bool:
    """Whether a peer has that pass."""
    return which != BOTH or not isinstance(peer, Within) or peer.has_gradient


def _demanding(backend: str, function: Callable[..., Tensor]) -> Within:
    return Within(function, lambda: llmengine.backend(backend))


def _pass(
    case: Case, which: str, runs: dict[str, Callable[..., Tensor]], leaves: list[Tensor], clock: Clock, limits: Ceilings
) -> Iterator[Row]:
    backward = which == BOTH
    moved, flops = case.work(which)
    floor = limits.floor_ms(case.dtype, moved, flops)
    limit = "memory" if limits.floor_ms(case.dtype, moved, 0) == floor else "multiply-adds"
    calls, failed = {}, {}
    for name, function in runs.items():
        try:
            calls[name] = call_of(function, leaves, backward)
            calls[name]()
            clock.wait()  # an error of a kernel is told late
        except PEER_ERRORS as error:
            calls.pop(name, None)
            failed[name] = _said(error)
    times, peaks, clocks = {}, {}, {}
    try:
        times = clock.medians(calls)
        clocks = {name: clock.megahertz(call) for name, call in calls.items()}
        peaks = {name: clock.peak_bytes(call) for name, call in calls.items()}
    except PEER_ERRORS as error:
        failed |= dict.fromkeys(calls, _said(error))
    for name in runs:
        row = {"operator": case.operator, "case": case.name, "dtype": NAMES[case.dtype], "peer": name, "pass": which}
        if name in failed:
            yield row | {"error": failed[name]}
            continue
        ms = times[name]
        yield row | {
            "ms": ms, "gbytes_per_s": moved / ms / 1e6, "tflops": flops / ms / 1e9, "percent": 100 * floor / ms,
            "limit": limit, "intensity": flops / moved, "peak_bytes": peaks[name],
            "sm_mhz": clocks[name],
        }  # fmt: skip


def _said(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def call_of(function: Callable[..., Tensor], leaves: list[Tensor], backward: bool) -> Callable[[], Any]:
    """What is timed: the function on the leaves, without gradients or with its backward."""
    context = function.context if isinstance(function, Within) else contextlib.nullcontext
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad(), context():
                return function(*leaves)

        return forward
    with context():
        upstream = torch.randn_like(function(*leaves))

    def both() -> tuple[Tensor, ...]:
        with context():
            return torch.autograd.grad(function(*leaves), leaves, upstream)

    return both


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """The rows for a person: a line each, peers with their time over ours (above 1, ours is faster)."""
    ours: dict[tuple[str, ...], float] = {}
    for row in rows:
        head = f"{row['operator']:21} {row['case']:27} {row['dtype']:5}{row['pass']:19} {row['peer']:17}"
        if "error" in row:
            yield f"{head}{row['error'][:80]}"
            continue
        key = (row["operator"], row["case"], row["dtype"], row["pass"])
        if row["peer"].startswith("llmengine"):
            ours[key] = min(row["ms"], ours.get(key, row["ms"]))
        rate = f"{row['tflops']:8.3f} TFLOP/s" if row["limit"] != "memory" else f"{row['gbytes_per_s']:8.1f} GB/s   "
        beside = "" if row["peer"].startswith("llmengine") or key not in ours else f"  {row['ms'] / ours[key]:5.2f}x"
        yield f"{head}{row['ms']:10.3f} ms {rate} {row['percent']:6.1f} % of {row['limit']}{beside}"
