from __future__ import annotations

import importlib.util

import pytest
import torch

collect_ignore = [] if importlib.util.find_spec("peft") else ["test_peft.py"]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing by a second thread, and lose a thousandfold where another program has its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
