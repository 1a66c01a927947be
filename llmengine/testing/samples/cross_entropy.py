"""Cases of cross-entropy: every option alone and together, ignored tokens, no labels, masked classes, no rows."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.testing.sample import Operator, Sample


def plain(
    input,
    target,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    *,
    z_loss=0.0,
    softcap=0.0,
    num_items=None,
):
    """The contract in PyTorch's own operators, in the dtype of the logits."""
    target = target.long()
    z = softcap * torch.tanh(input / softcap) if softcap else input
    valid = target != ignore_index
    if not valid.any():  # PyTorch's mean over no labels is NaN
        return torch.where(valid, 0.0, (z * 0).sum()) if reduction == "none" else (z * 0).sum()
    losses = torch_functional.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        losses = losses + torch.where(valid, z_loss * z.logsumexp(0 if z.ndim == 1 else 1).square(), 0.0)
    if reduction == "none":
        return losses
    if num_items is not None:
        return losses.sum() / num_items
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (valid.sum() if weight is None else weight[target[valid]].sum())


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def labels(classes, *shape):
        return torch.randint(classes, shape, generator=g)

    samples = []
    rows, classes = 6, 50
    for reduction, weighted, smoothing, z_loss, softcap in itertools.product(
        ("mean", "sum", "none"), (False, True), (0.0, 0.1), (0.0, 1e-2), (0.0, 5.0)
    ):
        target = labels(classes, rows)
        target[1] = -100
        options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
        if weighted:
            options["weight"] = randn(classes).abs()
        name = f"{reduction} weight={weighted} smoothing={smoothing} z={z_loss} cap={softcap}"
        samples.append(Sample(name, (3 * randn(rows, classes), target), options, ("weight",)))
    everything = {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 8.0}
    for shape in [(1, 1), (5, 1), (4, 3), (3, 16), (2, 1025), (3, 4099), (0, 7), (0, 0)]:
        target = labels(shape[1], shape[0]) if shape[0] else labels(1, 0)
        samples.append(Sample(f"{shape}", (2 * randn(*shape), target)))
        samples.append(Sample(f"{shape} options", (2 * randn(*shape), target), everything))
    samples.append(Sample("one token", (randn(9), labels(9).reshape(()))))
    samples.append(Sample("images", (randn(2, 5, 3, 4), labels(5, 2, 3, 4)), {"reduction": "none"}))
    samples.append(Sample("images mean", (randn(2, 5, 7), labels(5, 2, 7)), {"weight": randn(5).abs()}, ("weight",)))
    for reduction in ("mean", "sum", "none"):
        ignored = torch.full((4,), 3)
        options = {"ignore_index": 3, "reduction": reduction, **everything}
        samples.append(Sample(f"no labels {reduction}", (randn(4, 7), ignored), options))
    samples.append(Sample("ignore_index 2", (randn(8, 4), labels(4, 8)), {"ignore_index": 2}))
    samples.append(Sample("int32 target", (randn(8, 4), labels(4, 8).int())))
    masked = randn(5, 40)
    masked[:, 10:35] = -torch.inf
    masked[2, 1:] = -torch.inf  # one class is left
    samples.append(Sample("masked classes", (masked, torch.tensor([0, 9, 0, 39, 4])), {"reduction": "none"}))
    samples.append(Sample("masked target", (masked, torch.tensor([0, 9, 1, 12, 4])), {"reduction": "none"}))
    certain = torch.zeros(3, 100).double()
    certain[:, 5] = torch.tensor([5.0, 15.0, 60.0]).double()
    samples.append(Sample("nearly certain", (certain, torch.tensor([5, 5, 5])), {"reduction": "none"}))
    for number, weighted in ((31, True), (torch.tensor(17), False)):
        options = {"weight": randn(5).abs()} if weighted else {"reduction": "sum"}
        samples.append(
            Sample(f"of {number} items", (randn(8, 5), labels(5, 8)), options | {"num_items": number}, ("weight",))
        )
    samples.append(Sample("large", (1e4 * randn(4, 50), labels(50, 4)), {"reduction": "none"}))
    return samples


OPERATORS = [Operator("cross_entropy", functional.cross_entropy, _samples, plain)]
