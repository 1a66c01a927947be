"""Data-parallel steps whose gradients are those of one process: counts and gradients over torch.distributed's ranks.

A mean over a rank's own labels is wrong where ranks have unequally many: the mean of means is not the mean. So ranks
agree on the step's counts first, and each divides its sums by them. With DistributedDataParallel:

    items = step_items({"tokens": labelled_tokens_of(micro_batches)})       # of all of this rank's micro-batches
    for i, micro_batch in enumerate(micro_batches):
        with nullcontext() if i == len(micro_batches) - 1 else parallel.no_sync():
            parallel(**micro_batch, num_items_in_batch=items).loss.backward()
    optimizer.step()

Without it, and for models of which a loss does not reach every parameter (an XLNet that is fine-tuned has a query
stream that nothing reads), which DistributedDataParallel does not take:

    items = step_items({"tokens": labelled_tokens_of(micro_batches)}, averaged=False)
    for micro_batch in micro_batches:
        model(**micro_batch, num_items_in_batch=items).loss.backward()
    sum_gradients(model)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed
from torch.nn import Module

from llmengine.optim.main_grad import gradient_of


def step_items(
    items: Mapping[str, int], *, averaged: bool = True, group: distributed.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """What every rank divides its losses by: the model's num_items_in_batch for a step of all ranks together.

    items: how many labels of each kind this rank has in the step, all its micro-batches together; 0 is fine. Every rank
        of `group` (None: all) must call with the same names, or the collective does not match.
    averaged: the ranks' gradients will be averaged (DistributedDataParallel, FSDP), not summed: counts are then divided
        by the number of ranks.

    Returns () float32 tensors where the group's backend reduces; nothing waits for the device. A kind without a label
    anywhere counts 1: its loss is 0, not 0 / 0. Without torch.distributed: the items themselves.
    """
    if wrong := {name: count for name, count in items.items() if count < 0}:
        raise ValueError(f"step_items: counts must be 0 or more, got {wrong}")
    names, ranks = sorted(items), 1
    counts = torch.tensor([items[name] for name in names], dtype=torch.int64)
    if _several_ranks():
        ranks = distributed.get_world_size(group)
        counts = counts.to(_device(group))
        distributed.all_reduce(counts, group=group)
    shares = counts.clamp(min=1).double() / (ranks if averaged else 1)
    return dict(zip(names, shares.float().unbind(), strict=True))


def sum_gradients(model: Module, *, group: distributed.ProcessGroup | None = None) -> None:
    """Adds up every parameter's gradient over the ranks of `group` (None: all), in place: its `main_grad` where it has
    one (llmengine.optim.MainGradients).

    A parameter that has none on this rank counts as zeros; one that has none on any rank has zeros afterwards.
    """
    if not _several_ranks():
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            if (gradient := gradient_of(parameter)) is None:
                gradient = parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(gradient, group=group)


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _device(group: distributed.ProcessGroup | None) -> torch.device:
    """Where this group's backend reduces."""
    nccl = distributed.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
