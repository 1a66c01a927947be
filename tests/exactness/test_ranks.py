"""Two ranks with unequally many labels have the gradient of one process: averaged by PyTorch, and summed by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from llmengine.training.distributed import step_items, sum_gradients

from .cases import CASES, distance, gradients, packed
from .ranks import RANKS, WAYS, shares, unread, ways, work

BOUND = 3e-6  # in float32, as in test_splits.py


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """Both ranks' gradients of all cases, by "case/way/parameter": the processes start once for all."""
    directory = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(directory),), RANKS)
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_end_up_with_the_gradient_of_one_process(case, of_ranks):
    model = case.model(torch.float32)
    assert set(WAYS) - set(ways(case)) == {
        *(["parallel"] if unread(case) else []), *(["one without labels"] if case.always_labelled else []),
    }  # fmt: skip
    for way in ways(case):
        examples = [example for share in shares(case, way) for example in share]
        whole = gradients(model, [packed(case, examples)])
        for rank, found in enumerate(of_ranks):
            ours = {name: found[f"{case.name}/{way}/{name}"] for name in whole}
            assert distance(ours, whole) < BOUND, f"{way}, rank {rank}"


def test_ranks_are_ragged():
    for case in CASES:
        for way in ways(case):
            counts = [case.items(share) for share in shares(case, way)]
            assert counts[0] != counts[1], (case.name, way)
            assert way != "one without labels" or not any(counts[1].values())


def test_alone():
    """Without other processes the counts are the items, and there is nothing to add up."""
    assert step_items({"tokens": 12, "sequences": 0}) == {"tokens": 12, "sequences": 1}
    model = torch.nn.Linear(2, 2)
    sum_gradients(model)
    assert model.weight.grad is None
    with pytest.raises(ValueError, match=r"counts must be 0 or more, got {'tokens': -1}"):
        step_items({"tokens": -1})
