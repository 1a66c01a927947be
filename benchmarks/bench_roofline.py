"""Every case of `llmengine bench` (llmengine/roofline/cases.py), a benchmark for each peer: PyTorch's call, its
attention by flash and by cuDNN, FlexAttention, torch.compile, and Liger-Kernel where it is installed.

    pytest benchmarks/bench_roofline.py --benchmark-only -k "attention and bf16" --results FILE

On a GPU, or where --shapes asks for it: a CPU has the other files here. The JSON has, beside the times, percent of what
copies and products reach on this machine, and the most memory that a call holds (on a GPU). What a peer cannot do is
skipped with its reason. `benchmarks/gpu_suite.py` times the same cases in a process that a peer may break.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import DTYPES, device_of, finished

from llmengine.roofline.cases import BOTH, OPERATORS, SHAPES, Case, cases_of
from llmengine.roofline.ceilings import Ceilings, measure_ceilings
from llmengine.roofline.clock import Clock
from llmengine.roofline.measure import COMPILED, PEER_ERRORS, call_of, has


def pytest_generate_tests(metafunc):
    device = device_of(metafunc.config)
    wanted = metafunc.config.getoption("--shapes") or ("cuda" if device == "cuda" else None)
    shapes = SHAPES[wanted] if wanted else {}
    chosen = []
    for (operator, (kind, _)), (name, dtype) in itertools.product(OPERATORS.items(), DTYPES.items()):
        small = list(cases_of(operator, SHAPES["small"][kind][0], device, dtype))  # has their variants
        for shape, (number, case) in itertools.product(shapes.get(kind, []), enumerate(small)):
            variant = "-".join(["x".join(map(str, shape)), *case.name.split()[1:]])
            for which, peer in itertools.product(case.passes, peers(case, device)):
                if not has(case.run.get(peer, case.run["torch"]), which):
                    continue
                ids = f"{operator}-{variant}-{name}-{which.replace(' ', '')}-{peer.replace(' ', '_')}"
                chosen.append(pytest.param(operator, shape, number, dtype, which, peer, id=ids))
    metafunc.parametrize("operator, shape, number, dtype, which, peer", chosen)


def peers(case: Case, device: str) -> list[str]:
    """PyTorch's compiler takes longer than all others on a CPU, for calls that it hardly changes there."""
    return [*case.run, *([COMPILED] if device == "cuda" and case.tensors else [])]


@functools.cache
def ceilings(device: str, dtype: torch.dtype, small: bool) -> Ceilings:
    return measure_ceilings(Clock(device), [dtype], small)


def bench_case(benchmark, request, device, operator, shape, number, dtype, which, peer):
    torch.set_default_device(None)  # it takes time in every call of PyTorch
    case = next(itertools.islice(cases_of(operator, shape, device, dtype), number, None))
    clock = Clock(device)
    moved, flops = case.work(which)
    floor = ceilings(device, dtype, request.config.getoption("--shapes") == "small").floor_ms(dtype, moved, flops)
    call = working(case, which, peer, clock)
    benchmark.group = f"{operator} {case.name} {dtype} {which}".replace("torch.", "")
    benchmark.extra_info |= {"peer": peer, "flops": flops, "bytes": moved, "floor_ms": floor}
    benchmark.extra_info["peak_bytes"] = clock.peak_bytes(call)
    benchmark.pedantic(finished(call) if device == "cuda" else call, rounds=7, iterations=1, warmup_rounds=2)


def working(case: Case, which: str, peer: str, clock: Clock) -> Callable[[], object]:
    """The peer's call, once it has run; a peer, not we, may be unable to."""
    torch._dynamo.reset()  # else the tenth shape of a call would not be compiled any more
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    if peer != COMPILED and peer not in case.run:
        pytest.skip(f"{peer} takes the small case, and not {case.name}")
    try:
        function = torch.compile(case.run["torch"]) if peer == COMPILED else case.run[peer]
        call = call_of(function, leaves, which == BOTH)
        call()
        clock.wait()
    except PEER_ERRORS as error:
        if peer.startswith("llmengine"):
            raise
        pytest.skip(f"{peer}: {error}")
    return call
