from __future__ import annotations

import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Steps this small are all barriers with two threads on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*slow reference backend")
        yield
    torch.set_num_threads(threads)
