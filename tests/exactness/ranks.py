"""Two processes of torch.distributed that share a step's examples, and what gradients they end up with."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from llmengine.training.distributed import step_items, sum_gradients

from .cases import CASES, Case, Example, collect, packed

RANKS = 2
WAYS = ("parallel", "summed", "one without labels")


def shares(case: Case, way: str) -> list[list[Example]]:
    """Each rank's examples."""
    examples = case.examples()
    if way == "one without labels":
        return [examples[:5], case.without_labels()[5:]]
    return [examples[:5], examples[5:]]


def unread(case: Case) -> bool:
    """Whether the loss reaches not every parameter, so that DistributedDataParallel does not take the model."""
    return case.family == "xlnet" and case.head != "plm"


def ways(case: Case) -> list[str]:
    skipped = {"parallel" if unread(case) else "", "one without labels" if case.always_labelled else ""}
    return [way for way in WAYS if way not in skipped]


def work(rank: int, directory: str) -> None:
    """What each process does: every case in every way; the first process writes the gradients."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found = {}
    for case in CASES:
        model = case.model(torch.float32)
        for way in ways(case):
            of_ranks = step(model, case, shares(case, way)[rank], in_parallel=way != "summed" and not unread(case))
            found |= {f"{case.name}/{way}/{name}": gradient for name, gradient in of_ranks.items()}
    save_file(found, Path(directory) / f"rank{rank}.safetensors")
    distributed.destroy_process_group()


def step(model: torch.nn.Module, case: Case, examples: list[Example], *, in_parallel: bool) -> dict[str, Tensor]:
    """The gradients of a step of which these examples are this rank's, in two micro-batches."""
    model.zero_grad()
    micro_batches = [packed(case, examples[:2]), packed(case, examples[2:])]
    items = step_items(case.items(examples), averaged=in_parallel)
    parallel = DistributedDataParallel(model) if in_parallel else None
    for i, micro_batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if parallel is None or last else parallel.no_sync():
            (parallel or model)(**micro_batch, num_items_in_batch=items).loss.backward()
    if parallel is None:
        sum_gradients(model)
    return collect(model)
