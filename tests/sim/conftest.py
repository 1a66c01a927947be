from __future__ import annotations

import pytest

from llmengine.backends.cuda.native import PRODUCTS
from llmengine.testing import simulator


@pytest.fixture(scope="module")
def native():
    simulator.ready()
    from llmengine import _cuda_sim

    return _cuda_sim


@pytest.fixture(params=["sm80", "sm90a"])
def core(request, monkeypatch) -> str:
    """Whose kernels multiply."""
    monkeypatch.setenv(PRODUCTS, request.param)
    return request.param
