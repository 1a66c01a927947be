"""Who runs attention: every backend, and of CUDA every set of kernels."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from llmengine.backends.cuda.native import attention_backward_by, attention_by
from llmengine.testing import Target, targets

HALVES = (torch.bfloat16, torch.float16)


class Way(NamedTuple):
    """Who runs a call; of CUDA also whose kernels, and in how many passes backward."""

    target: Target
    kernels: str = ""
    passes: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.target.backend, self.kernels, self.passes)))

    @contextlib.contextmanager
    def asked_for(self) -> Iterator[None]:
        if self.target.prepare:
            self.target.prepare(self.name)
        with contextlib.ExitStack() as stack:
            if self.kernels:
                stack.enter_context(attention_by(self.kernels))
                stack.enter_context(attention_backward_by(self.passes or "two_pass"))
            yield


def ways(only_cuda: bool = False) -> list:
    """All of them, each with each dtype that it takes."""
    found = [] if only_cuda else [Way(Target("reference", "cpu", (torch.float32, *HALVES)))]
    for target in targets():
        if target.backend not in ("cuda", "cuda_sim"):
            found += [] if only_cuda else [Way(target)]
            continue
        target = dataclasses.replace(target, dtypes=HALVES)
        found.append(Way(target, "sm80"))
        if target.backend == "cuda_sim" or torch.cuda.get_device_capability() == (9, 0):
            found += [Way(target, "sm90a"), Way(target, "sm90a", "one_pass")]
    return [pytest.param(way, d, id=f"{way.name}-{d}") for way in found for d in way.target.dtypes]
