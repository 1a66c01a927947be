"""Cases of linear cross-entropy: cross-entropy's options alone and together, odd sizes, several blocks of classes."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.testing.sample import Operator, Sample
from llmengine.testing.samples.cross_entropy import plain as plain_cross_entropy


def plain(input, linear_weight, target, *, linear_bias=None, **options):
    """The contract in PyTorch's own operators: the logits whole, in the dtype of the input."""
    logits = torch_functional.linear(input, linear_weight, linear_bias)
    loss = plain_cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), **options)
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def sample(name, shape, classes, *, bias=True, weighted=False, ignored=0, **options):
        d = shape[-1]
        target = torch.randint(classes, shape[:-1], generator=g)
        target.view(-1)[:ignored] = options.get("ignore_index", -100)
        if bias:
            options["linear_bias"] = randn(classes)
        if weighted:
            options["weight"] = randn(classes).abs()
        return Sample(name, (randn(*shape), 3 * max(d, 1) ** -0.5 * randn(classes, d), target), options, ("weight",))

    samples = [sample("few tokens", (6, 20), 50, ignored=2)]
    samples += [  # tokens enough that one lucky rounding of plain PyTorch's does not set the law's bound
        sample(
            f"{reduction} bias={bias} weight={weighted} smoothing={smoothing} z={z_loss} cap={softcap}", (40, 20), 50,
            bias=bias, weighted=weighted, ignored=2, reduction=reduction, label_smoothing=smoothing, z_loss=z_loss,
            softcap=softcap,
        )
        for reduction, bias, weighted, smoothing, z_loss, softcap in itertools.product(
            ("mean", "sum", "none"), (True, False), (False, True), (0.0, 0.1), (0.0, 1e-2), (0.0, 5.0)
        )
    ]  # fmt: skip
    everything = {"weighted": True, "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 8.0}
    for shape, classes in [
        ((1, 1), 1), ((5, 3), 1), ((4, 7), 3), ((2, 3, 33), 65), ((130, 40), 97), ((3, 16), 2600), ((64,), 10),
        ((0, 8), 5), ((40, 300), 530),
    ]:  # fmt: skip
        samples.append(sample(f"{shape} C={classes}", shape, classes))
        samples.append(
            sample(f"{shape} C={classes} options", shape, classes, ignored=1, reduction="none", **everything)
        )
    for reduction in ("mean", "sum", "none"):
        samples.append(
            sample(f"no labels {reduction}", (4, 6), 7, ignored=4, ignore_index=3, reduction=reduction, **everything)
        )
    samples.append(sample("of 31 items", (40, 20), 50, ignored=3, num_items=31, **everything))
    samples.append(sample("of items in a tensor", (40, 20), 50, num_items=torch.tensor(57), reduction="sum"))
    return samples


OPERATORS = [Operator("linear_cross_entropy", functional.linear_cross_entropy, _samples, plain)]
