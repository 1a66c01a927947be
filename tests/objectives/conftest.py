from __future__ import annotations

import pytest
import torch

from llmengine.data import Tokenizer


@pytest.fixture(scope="session")
def bart_bpe(novels):
    return Tokenizer.train(novels, "bpe", 1000, family="bart")


@pytest.fixture(scope="session")
def t5_bpe(novels):
    return Tokenizer.train(novels, "bpe", 1000, family="t5")


@pytest.fixture(scope="session")
def xlnet_bpe(novels):
    return Tokenizer.train(novels, "bpe", 1000, family="xlnet")


@pytest.fixture(autouse=True)
def one_thread():
    """Steps this small are all barriers with two threads on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
