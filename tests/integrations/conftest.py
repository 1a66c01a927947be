from __future__ import annotations

import importlib.util

import pytest
import torch

OPTIONAL = {"peft": "test_peft.py", "lightning": "test_lightning.py"}
collect_ignore = [file for package, file in OPTIONAL.items() if importlib.util.find_spec(package) is None]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing by a second thread, and lose a thousandfold where another program has its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
