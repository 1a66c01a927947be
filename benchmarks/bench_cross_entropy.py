"""Cross-entropy of given logits, beside torch.nn.functional: whole vocabularies, with and without label smoothing.

"masked" gives 15 % of the tokens a label, as masked language modelling does, and ignores the others; "selected" is
PyTorch at its best there: it picks the labelled rows first. On bf16 logits PyTorch returns its loss in bf16, ours is
float32. "copy" copies as many bytes as are moved where all are labelled. The pairs are the classes of next-sentence
prediction: there the way to the kernel is what is measured.
"""

from __future__ import annotations

import pytest
import torch
from conftest import copies, forward_backward
from torch.nn import functional as torch_functional

from llmengine import functional

IGNORED = -100
# name: (tokens, classes)
SHAPES = {"bert": (512, 30522), "gpt2": (512, 50257), "small": (4096, 2048), "pairs": (32, 2)}
# name: (share of the tokens that have labels, label smoothing)
CASES = {"all": (1.0, 0.0), "smoothed": (1.0, 0.1), "masked": (0.15, 0.0)}


def inputs(shape: str, case: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    tokens, classes = SHAPES[shape]
    share, smoothing = CASES[case]
    torch.manual_seed(0)
    target = torch.randint(classes, (tokens,))
    target[torch.randperm(tokens)[round(tokens * share) :]] = IGNORED
    return torch.randn(tokens, classes).to(dtype), target, smoothing


def function(peer: str, target: torch.Tensor, smoothing: float):
    if peer == "selected":
        labelled = target != IGNORED
        return lambda x: torch_functional.cross_entropy(x[labelled], target[labelled], label_smoothing=smoothing)
    room = functional if peer == "llmengine" else torch_functional
    return lambda x: room.cross_entropy(x, target, label_smoothing=smoothing)


def peers(*others: str) -> pytest.MarkDecorator:
    """Every shape and case, beside PyTorch and these where all tokens are labelled; "selected" where not all are."""
    return pytest.mark.parametrize(
        "shape, case, peer",
        [
            pytest.param(shape, case, peer, id=f"{shape}-{case}-{peer}")
            for shape in SHAPES
            for case in (CASES if shape != "pairs" else ["all"])
            for peer in ("llmengine", "torch", *(["selected"] if case == "masked" else others))
        ],
    )


@peers()
def bench_forward(side_by_side, dtype, shape, case, peer):
    x, target, smoothing = inputs(shape, case, dtype)
    loss = function(peer, target, smoothing)
    # the logits of labelled tokens, once
    side_by_side(peer, {peer: lambda: loss(x)}, bytes_moved=CASES[case][0] * x.numel() * x.element_size())


@peers("copy")
def bench_forward_backward(side_by_side, dtype, shape, case, peer):
    x, target, smoothing = inputs(shape, case, dtype)
    call = copies(x, 1) if peer == "copy" else forward_backward(function(peer, target, smoothing), x)
    # the logits of labelled tokens twice, and the gradient of all logits
    side_by_side(peer, {peer: call}, bytes_moved=(1 + 2 * CASES[case][0]) * x.numel() * x.element_size())
