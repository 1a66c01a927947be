"""Processes of torch.distributed that hold shards of a head's classes, and the losses and gradients they end up with:
for tests/test_linear_cross_entropy_shard.py, which compares them with one process's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed

import llmengine
from llmengine import functional
from llmengine.functional import VocabularyShard
from llmengine.testing import Sample

CLASSES = 91
# Where the shards begin, by how many there are: uneven ones, and some without a class.
SPLITS = {2: [(0, 50), (0, 0), (0, 91)], 3: [(0, 7, 60), (0, 40, 40), (0, 1, 90)]}
PLACES = [("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 6.0}


def samples() -> list[Sample]:
    """Every reduction with every option and with none; labels of the first 40 classes alone; none at all; no tokens."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def sample(name: str, tokens: int, *, up_to: int = CLASSES, ignored: int = 7, weighted: bool = True, **options):
        target = torch.randint(up_to, (tokens,), generator=g)
        target[:ignored] = options.setdefault("ignore_index", 1)  # a class of a shard, and its number in another
        if weighted:
            options |= {"weight": randn(CLASSES).abs(), "linear_bias": randn(CLASSES)}
        return Sample(name, (randn(tokens, 32), randn(CLASSES, 32) / 2, target), options, ("weight",))

    found = []
    for reduction in ("mean", "sum", "none"):
        found.append(sample(f"{reduction} alone", 60, weighted=False, reduction=reduction))
        found.append(sample(f"{reduction} everything", 60, reduction=reduction, **EVERYTHING))
        found.append(sample(f"{reduction} no labels", 5, ignored=5, reduction=reduction, **EVERYTHING))
    found.append(sample("few classes", 40, up_to=40, ignored=0, reduction="none", label_smoothing=0.2))
    found.append(sample("no tokens", 0, reduction="mean", **EVERYTHING))
    return found


def upstream(loss: Tensor) -> Tensor:
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(loss)


def work(rank: int, ranks: int, directory: str) -> None:
    """What each process does; it writes what it has got."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    found: dict[str, Tensor] = {}
    for backend, dtype in PLACES:
        for i, sample in enumerate(samples()):
            for split in SPLITS[ranks]:
                for whole in (True, False) if i < 2 else (True,):
                    key = f"{dtype}/{sample.name}/{split}/{whole}"
                    of_rank = step(sample.rounded(dtype), backend, split, rank, whole)
                    found |= {f"{key}/{name}": tensor for name, tensor in of_rank.items()}
    save_file(found, Path(directory) / f"rank{rank}.safetensors")
    distributed.destroy_process_group()


def step(sample: Sample, backend: str, split: tuple[int, ...], rank: int, whole: bool) -> dict[str, Tensor]:
    """whole: the gradient of the input is the sum of all shards'."""
    first, end = (*split, CLASSES)[rank : rank + 2]
    x, weight, target = sample.args
    leaves = {"input": x.clone(), "weight": weight[first:end].clone()}
    options = dict(sample.kwargs)
    if "linear_bias" in options:
        leaves["bias"] = options["linear_bias"] = options["linear_bias"][first:end].clone()
    for leaf in leaves.values():
        leaf.requires_grad_()
    shard = VocabularyShard.of_group(first, CLASSES, sum_input_gradient=whole)
    with llmengine.backend(backend):
        loss = functional.linear_cross_entropy(leaves["input"], leaves["weight"], target, shard=shard, **options)
        with torch.no_grad():
            again = functional.linear_cross_entropy(leaves["input"], leaves["weight"], target, shard=shard, **options)
        assert torch.equal(loss, again)
        loss.backward(upstream(loss))
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
