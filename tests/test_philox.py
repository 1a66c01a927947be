"""The one generator of all backends, against its authors' answers. That backends draw alike is tested with dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import compiled

from llmengine.backends.reference.philox import draws

# seed, counter as (row >> 32, stream, row, column / 4), what Philox 4x32-10 makes of them (Random123, kat_vectors)
ANSWERS = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


def test_the_kernels_generator_has_the_published_answers(tmp_path: Path):
    compiled(["tests/csrc/philox_test.cpp"], tmp_path / "philox_test", [])


@pytest.mark.parametrize("seed, counter, answer", ANSWERS, ids=["zeros", "pi"])
def test_the_reference_has_the_published_answers(seed: int, counter: tuple, answer: tuple, monkeypatch):
    high, stream, low, quad = counter
    row = torch.tensor([high << 32 | low])
    # one quad of columns, as though all before it were there
    monkeypatch.setattr(torch, "arange", lambda *_, **__: torch.tensor([quad]))
    assert draws(seed, stream, row, 4).tolist() == [list(answer)]
