from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest
import torch

from llmengine.testing import interpreter

# Without a GPU, Triton kernels run in Triton's interpreter; it must be chosen before their files are read.
if not torch.cuda.is_available():
    if os.environ.setdefault("TRITON_INTERPRET", "1") == "1" and importlib.util.find_spec("triton"):
        interpreter.prepare()

# Whether a test passes must not depend on how busy the machine is.
hypothesis.settings.register_profile("llmengine", deadline=None)
hypothesis.settings.load_profile("llmengine")

# Two threads wherever the tests run: enough to show races and reductions that depend on the split.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def novels() -> list[str]:
    """The first chapters of three novels."""
    from llmengine.data import read_documents

    return [document[:60_000] for document in read_documents("austen")[:3]]


@pytest.fixture(scope="session")
def wordpiece(novels):
    from llmengine.data import Tokenizer

    return Tokenizer.train(novels, "wordpiece", 1000)


@pytest.fixture(scope="session")
def bpe(novels):
    from llmengine.data import Tokenizer

    return Tokenizer.train(novels, "bpe", 1000)
