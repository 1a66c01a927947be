from __future__ import annotations

import pytest

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
