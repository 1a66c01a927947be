"""Embedding in the simulator: rows of every width, runs of equal ids of every length, ids that are no rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import llmengine
from llmengine import functional

from .harness import DTYPES, Break, assert_caught, check

ROWS = 30


def tokens(*runs: int) -> Tensor:
    """So many tokens of ids 0, 1, 2 and so on, shuffled."""
    ids = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(len(ids)))]


# In chunks of 16: within one, up to its end, across one end and several, more chunks than a block has warps.
RUNS = {
    "few": (1, 2, 0, 3),
    "whole chunks": (16, 16, 32, 0, 16),
    "across": (10, 12, 3, 3, 40, 1, 7),
    "one id": (47,),
    "many": (5, 300, 2, 140, 1),
}


def look_up(library, ids: Tensor, padding_idx: int | None, scale: float):
    def call(weight: Tensor) -> Tensor:
        if library is functional:
            return functional.embedding(ids, weight, padding_idx, scale=scale)
        return library.embedding(ids, weight, padding_idx) * scale

    return call


# A line of 32 vectors, fewer and more; whole vectors and not.
@pytest.mark.parametrize("columns", [5, 64, 515])
@pytest.mark.parametrize("runs", RUNS)
@DTYPES
def test_runs_of_every_length(native, dtype: torch.dtype, runs: str, columns: int):
    ids = tokens(*RUNS[runs])
    weight = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    for padding_idx, scale in ((None, 1.0), (1, 2.5)):
        ours, theirs = (look_up(library, ids, padding_idx, scale) for library in (functional, torch_functional))
        check(ours, [weight], native, plain_call=theirs)


@DTYPES
def test_an_id_that_is_no_row_is_nan_and_has_no_gradient(native, dtype: torch.dtype):
    weight = torch.ones(5, 20, dtype=dtype, requires_grad=True)
    with llmengine.backend("cuda_sim"):
        rows = functional.embedding(torch.tensor([0, 5, -1, 4]), weight)
        (gradient,) = torch.autograd.grad(rows, weight, torch.ones_like(rows))
    assert rows.isnan().all(1).tolist() == [False, True, True, False] and not rows[::3].isnan().any()
    assert gradient.sum(1).tolist() == [20, 0, 0, 0, 20]


# ---- one line broken -------------------------------------------------------------------------------------------------


def attempt() -> None:
    g = torch.Generator().manual_seed(1)
    for runs in ("across", "many"):
        ids, weight = tokens(*RUNS[runs]), torch.randn(len(RUNS[runs]), 37, generator=g)
        plain = look_up(torch_functional, ids, 1, 0.5)
        check(look_up(functional, ids, 1, 0.5), [weight], schedules=("random",), plain_call=plain)
    with llmengine.backend("cuda_sim"):
        assert functional.embedding(torch.tensor([len(weight)]), weight).isnan().all()


EMBEDDING = ("embedding", "embedding.cu")
BREAKS: dict[str, Break] = {
    "an id past the table": (*EMBEDDING, "id < p.rows) row[k]", "id <= p.rows) row[k]", "past the end of weight|reads"),
    "tokens past the last": (
        *EMBEDDING, "p.tokens - first < kChunk ? static_cast<int>(p.tokens - first) : kChunk", "kChunk", "past the end",
    ),
    "an inherited run takes the place of its own": (*EMBEDDING, "inherited ? 0 : 1", "1", "exceeds|differs|races"),
    "a run is taken for inherited by the next": (*EMBEDDING, "inherited = false;", "", "exceeds|differs"),
    "what the first chunk began": (*EMBEDDING, "c == chunk ? 1 : 0", "0", "exceeds|differs"),
    "every chunk of a run adds it up": (
        *EMBEDDING, " || (p.goes_on(first) && p.ids[first] == id)", "", "races: writes .* of grad_weight",
    ),
    "a run ends with its second chunk": (*EMBEDDING, "(end_of_run(p, next, id) - 1) / kChunk", "chunk + 1", "exceeds"),
    "no barrier": (*EMBEDDING, "__syncthreads();", "", "reads shared memory that no thread|races"),
    "padding counts": (*EMBEDDING, " && id != padding_idx", "", "exceeds"),
    "the scale is forgotten": (*EMBEDDING, "total[i] *= p.scale", "total[i] *= 1.0f", "exceeds"),
    "a token of another place": (*EMBEDDING, "p.token[place]", "place", "exceeds"),
}  # fmt: skip


def test_whole_kernels_pass_what_broken_ones_must_fail(native):
    native.set_schedule("random", 1)
    attempt()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_caught(native, name: str, tmp_path: Path, monkeypatch):
    assert_caught(BREAKS[name], attempt, tmp_path, monkeypatch)
