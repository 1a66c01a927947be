"""Kernels are launched on the device of their tensors and on the stream that is current there; no GPU is asked."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from llmengine.backends.cuda.native import Native


@pytest.fixture
def called(monkeypatch) -> tuple[Native, list]:
    """A native module that records its calls, where device 1 has a stream of its own."""
    entered, calls = [0], []

    @contextlib.contextmanager
    def device(chosen: torch.device):
        entered.append(chosen.index)
        yield
        entered.pop()

    streams = {0: 0, 1: 0x5678}
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=streams[entered[-1]]))
    native = Native("a module", "cuda", "cuda", "")
    native.module = SimpleNamespace(
        kernel=lambda **given: calls.append((entered[-1], given)), take_launched=list, take_left=list
    )
    return native, calls


@pytest.mark.parametrize("device, stream", [(1, 0x5678), (0, 0)])
def test_a_kernel_goes_to_its_tensors_device_and_the_current_stream(called, device: int, stream: int):
    native, calls = called
    native.call("kernel", SimpleNamespace(is_cuda=True, device=torch.device("cuda", device)), input=3)
    assert calls == [(device, {"input": 3, "stream": stream})]


def test_a_tensor_in_memory_knows_no_stream(called):
    native, calls = called
    native.call("kernel", torch.ones(2), input=3)
    assert calls == [(0, {"input": 3, "stream": 0})]
