"""Warp matrix instructions a second in the simulator of CUDA kernels: 10,000 of one warp, a call. The time of a call in
ms is that of an instruction in units of 0.1 us.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from llmengine.testing import simulator

TIMES = 10_000


@pytest.mark.parametrize("order", ["forward", "random"])
@pytest.mark.parametrize("name", ["16x8x16_bf16", "16x8x16_f16", "16x8x8_bf16", "16x8x8_tf32", "many_loads"])
def bench_instruction(benchmark, name: str, order: str):
    native = ctypes.CDLL(str(simulator.build("simulator_layouts") / "libsimulator_layouts.so"))
    native.run_layout.restype = ctypes.c_char_p
    native.set_schedule(order.encode(), ctypes.c_uint64(1))
    given = torch.ones(320, dtype=torch.bfloat16).repeat_interleave(2).view(torch.int32)  # finite as any kind
    out = torch.empty(128, dtype=torch.int32)
    arrays = [a for t in (given, out) for a in (ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(t.numel()))]

    def call() -> None:
        assert native.run_layout(name.encode(), *arrays, 1, TIMES) is None

    benchmark.pedantic(call, rounds=7, iterations=1, warmup_rounds=1)
