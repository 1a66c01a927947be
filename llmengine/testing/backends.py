"""The backends that the laws of tests/test_ops.py hold for on this machine, and how each of them is made ready."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmengine.testing.sample import Operator


@dataclass(frozen=True)
class BackendUnderTest:
    name: str
    dtypes: tuple[torch.dtype, ...]
    # Called before each test with the test's name; builds what has to be built, and skips nothing.
    prepare: Callable[[str], None] = lambda test: None

    def runs(self, operator: Operator) -> bool:
        """Whether the backend has kernels for both passes of the operator: their names begin with its file's."""
        stem = operator.function.__module__.rsplit(".", 1)[-1]
        kernels = importlib.import_module(f"llmengine.backends.{self.name}").KERNELS
        return all(f"{stem}_{which}" in kernels for which in ("forward", "backward"))


def backends_under_test() -> list[BackendUnderTest]:
    return [
        BackendUnderTest("cpu", (torch.float32, torch.bfloat16)),
        BackendUnderTest("cuda_sim", (torch.float32, torch.bfloat16, torch.float16), _prepare_simulator),
    ]


def named(name: str) -> BackendUnderTest:
    return next(b for b in backends_under_test() if b.name == name)


SCHEDULES = ("forward", "reversed", "round_robin", "random")


def _prepare_simulator(test: str) -> None:
    """Every test has a schedule of its own, and always the same one."""
    from llmengine.testing import simulator

    simulator.ready()
    number = zlib.crc32(test.encode())
    module = importlib.import_module("llmengine._cuda_sim")
    module.set_schedule(SCHEDULES[number % len(SCHEDULES)], number)
