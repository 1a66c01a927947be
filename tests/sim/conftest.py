from __future__ import annotations

import pytest

from llmengine.backends.cuda.native import PRODUCTS
from llmengine.testing import simulator


@pytest.fixture(scope="module")
def native():
    simulator.ready()
    from llmengine import _cuda_sim

    return _cuda_sim


@pytest.fixture
def many_multiprocessors(native):
    """As many as run four clusters at once, instead of one."""
    native.set_multiprocessors(count=8)
    yield
    native.set_multiprocessors(count=3)


@pytest.fixture(params=["sm80", "sm90a"])
def core(request, monkeypatch) -> str:
    """Whose kernels multiply."""
    monkeypatch.setenv(PRODUCTS, request.param)
    return request.param
