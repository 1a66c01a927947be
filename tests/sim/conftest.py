from __future__ import annotations

import pytest

from llmengine.testing import simulator


@pytest.fixture(scope="module")
def native():
    simulator.ready()
    from llmengine import _cuda_sim

    return _cuda_sim
