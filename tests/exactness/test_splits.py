"""A batch's gradient is the same in one piece, accumulated, packed and padded on any side: every head, every family.

Differences are relative to the gradient's largest element. In float64 (the reference backend) 1e-6 is the bound, of
which only left padding under rotary positions, whose angles are float32, uses a noticeable part; in float32 (the
kernels of the CPU) sums have another order, and the bound is a few roundings of the largest element.
"""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, LENGTHS, distance, gradients, packed, padded

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BOUNDS = {torch.float64: 1e-6, torch.float32: 3e-6}


@each
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_any_split_and_any_layout_give_the_gradient_of_one_batch(case, dtype):
    model, examples = case.model(dtype), case.examples()
    items = case.items(examples)
    whole = gradients(model, [packed(case, examples)])
    ways = {
        "the mean is the sum over the counts": gradients(model, [packed(case, examples)], items),
        "padded on the right": gradients(model, [padded(case, examples, "right")]),
        "padded on the left": gradients(model, [padded(case, examples, "left")]),
        "2 micro-batches, padded": gradients(model, [padded(case, examples[i::2], "right") for i in (0, 1)], items),
        "4 micro-batches, packed": gradients(model, [packed(case, examples[i::4]) for i in range(4)], items),
        "one by one, without padding": gradients(
            model, [padded(case, [e], "right", n) for e, n in zip(examples, LENGTHS, strict=True)], items
        ),
        "one by one, padded": gradients(model, [padded(case, [example], "left") for example in examples], items),
    }
    for way, found in ways.items():
        assert distance(found, whole) < BOUNDS[dtype], way


@pytest.mark.parametrize("case", [c for c in CASES if not c.always_labelled], ids=lambda case: case.name)
def test_a_batch_without_labels_has_loss_0_and_gradients_of_zero(case):
    model, examples = case.model(torch.float32), case.without_labels()
    for batch in (packed(case, examples), padded(case, examples, "right"), padded(case, examples, "left")):
        for items in (None, {"tokens": 7, "sequences": 7}):
            model.zero_grad()
            out = model(**batch, num_items_in_batch=items)
            assert out.loss.item() == 0 and all(loss.item() == 0 for loss in out.losses.values())
            out.loss.backward()
            found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            assert found and not any(gradient.any() for gradient in found)


def test_the_examples_are_ragged():
    """Else a mean of means would be the mean, and nothing were proven."""
    for case in CASES:
        counts = [sum(case.items([example]).values()) for example in case.examples()]
        assert case.always_labelled or (len(set(counts)) > 1 and min(counts) == 0), case.name
    assert len(set(LENGTHS)) > 3
