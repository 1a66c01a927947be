"""What no operator can pass: the rates of copying and of multiply-adds, the best that this machine was seen to do."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

from llmengine.roofline.clock import Clock

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Ceilings:
    """
    Attributes:
        gbytes_per_s: of a copy that no cache holds, bytes read and written.
        tflops: of multiply-adds, by dtype.
    """

    gbytes_per_s: float
    tflops: dict[torch.dtype, float]

    def floor_ms(self, dtype: torch.dtype, moved: float, flops: float) -> float:
        """The least time in which so many bytes are moved and so many operations done."""
        return max(moved / self.gbytes_per_s / 1e6, flops / self.tflops[dtype] / 1e9)

    def as_json(self) -> dict[str, object]:
        rates = {NAMES[dtype]: rate for dtype, rate in self.tflops.items()}
        return {"gbytes_per_s": self.gbytes_per_s, "tflops": rates}


def measure_ceilings(clock: Clock, dtypes: list[torch.dtype], small: bool = False) -> Ceilings:
    """Args:
    small: sizes that take no time and tell nothing, for tests.
    """
    elements = 1 << 12 if small else 1 << (29 if clock.device == "cuda" else 27)
    source = torch.zeros(elements, dtype=torch.bfloat16, device=clock.device)
    target = torch.empty_like(source)
    copy = clock.least(lambda: target.copy_(source))
    return Ceilings(4 * elements / copy / 1e6, {dtype: _tflops(clock, dtype, small) for dtype in dtypes})


def _tflops(clock: Clock, dtype: torch.dtype, small: bool) -> float:
    """On a CPU the faster of our kernels' innermost product, its operands in the first-level cache, and PyTorch's
    product of two matrices; on a GPU the latter."""
    n = 64 if small else 8192 if clock.device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    rate = 2 * n**3 / clock.least(lambda: a @ b) / 1e9
    return max(rate, _native_tflops(clock, dtype, small)) if clock.device == "cpu" else rate


def _native_tflops(clock: Clock, dtype: torch.dtype, small: bool) -> float:
    from llmengine.ops.registry import load

    if load("cpu").unavailable is not None or dtype == torch.float16:
        return 0.0
    module = importlib.import_module("llmengine._cpu")
    unit, flops = torch.empty(0, dtype=dtype), torch.zeros(1, dtype=torch.float64)
    rounds = 10 if small else 20000

    ms = clock.least(lambda: module.multiply_add_peak(unit=unit, rounds=rounds, flops=flops))
    return float(flops) / ms / 1e9
