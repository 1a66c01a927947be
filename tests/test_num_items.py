"""Losses of a part of a step's tokens, divided by how many items the whole step has: on every backend, of logits, of a
linear layer's, and of a shard of its classes."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.functional import VocabularyShard
from llmengine.testing import Operator, Target, all_operators, targets

CLASSES, D, PARTS = 21, 8, (1, 7, 3, 2)  # tokens of micro-batches
LOSSES = [op for op in all_operators() if op.name in ("cross_entropy", "linear_cross_entropy")]
ON = [
    pytest.param(t, op, id=f"{t.backend}-{op.node}")
    for t in targets()
    for op in LOSSES
    if t.has(op) or op.node in t.partial
]


@pytest.fixture(autouse=True)
def target_is_ready(request):
    target = request.node.callspec.params.get("target") if hasattr(request.node, "callspec") else None
    if target is not None and target.prepare:
        target.prepare(request.node.name)


class Step:
    """A step's tokens, and the loss of some of them."""

    def __init__(self, target: Target, op: Operator):
        g = torch.Generator().manual_seed(3)
        self.target, self.op, self.dtype = target, op, torch.bfloat16 if op.node in target.partial else target.dtypes[0]

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(target.device, self.dtype)

        tokens = sum(PARTS)
        self.linear = op.name == "linear_cross_entropy"
        self.rows = randn(tokens, D if self.linear else CLASSES).requires_grad_()
        self.head = randn(CLASSES, D).requires_grad_()
        self.labels = torch.randint(CLASSES, (tokens,), generator=g).to(target.device)
        self.labels[1:4] = -100  # three of the second micro-batch
        self.labels[-2:] = -100  # all of the last
        self.options: dict = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 9.0}
        if op.node == "linear_cross_entropy_shard":
            self.options["shard"] = VocabularyShard(0, CLASSES)
        self.leaves = [self.rows, self.head] if self.linear else [self.rows]

    def loss(self, rows: slice, **options) -> Tensor:
        x, labels = self.rows[rows], self.labels[rows]
        given = (x, self.head, labels) if self.linear else (x, labels)
        with llmengine.backend(self.target.backend):
            return self.op.function(*given, **self.options | options)

    def with_gradients(self, losses: list[Tensor]) -> list[Tensor]:
        gradients = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in self.leaves]
        with llmengine.backend(self.target.backend):
            for loss in losses:
                for sum_, gradient in zip(gradients, torch.autograd.grad(loss, self.leaves), strict=True):
                    sum_ += gradient
        return [torch.stack([loss.detach() for loss in losses]).sum(), *gradients]

    def parts(self, num_items, **options) -> list[Tensor]:
        bounds = [sum(PARTS[:i]) for i in range(len(PARTS) + 1)]
        cuts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        return self.with_gradients([self.loss(cut, num_items=num_items, **options) for cut in cuts])

    def assert_close(self, ours: list[Tensor], expected: list[Tensor]) -> None:
        for a, b in zip(ours, expected, strict=True):
            assert b.abs().max() > 0
            bound = 1e-5 if self.dtype == torch.float32 else 2**-6
            torch.testing.assert_close(a, b, rtol=bound, atol=bound * b.abs().max().item())


@pytest.mark.parametrize("target, op", ON)
def test_unequal_micro_batches_add_up_to_one_batch(target: Target, op: Operator):
    """Its mean, which none of their own means do, with the count as a number, and in tensors of any place and dtype."""
    step = Step(target, op)
    expected = step.with_gradients([step.loss(slice(None))])
    count = int((step.labels != -100).sum())
    ways = [
        (torch.tensor(count, device=target.device), "mean"),
        (count, "sum"),
        (float(count), "mean"),
        (torch.tensor([count], dtype=torch.float64), "sum"),
    ]
    for num_items, reduction in ways[: 1 if target.device == "cpu" and target.backend != "cpu" else None]:
        found = step.parts(num_items, reduction=reduction)
        assert found[0].dtype == torch.float32 and found[0].shape == ()
        step.assert_close(found, expected)
    means = step.with_gradients([step.loss(slice(0, 1)), step.loss(slice(1, 8)), step.loss(slice(8, None))])
    assert not torch.allclose(means[0] / 3, expected[0], rtol=1e-3)


@pytest.mark.parametrize("target, op", ON)
def test_no_items_divide_nothing(target: Target, op: Operator):
    """Micro-batches without labels have loss and gradients 0, of a step without any too; with labels, their sum."""
    step = Step(target, op)
    for num_items in (0, torch.tensor(0), 5, numpy.int64(5), numpy.float32(5)):
        assert not any(t.any() for t in step.with_gradients([step.loss(slice(-2, None), num_items=num_items)]))
    summed = step.with_gradients([step.loss(slice(0, 4), reduction="sum")])
    for num_items in (0, torch.tensor(0, device=target.device)):
        step.assert_close(step.with_gradients([step.loss(slice(0, 4), num_items=num_items)]), summed)


@pytest.mark.parametrize("target, op", ON)
def test_weights_of_classes_are_counted_by_the_caller(target: Target, op: Operator):
    step = Step(target, op)
    weight = torch.rand(CLASSES, generator=torch.Generator().manual_seed(5)).to(target.device) + 0.5
    total = weight[step.labels[step.labels != -100]].sum()
    step.assert_close(step.parts(total, weight=weight), step.with_gradients([step.loss(slice(None), weight=weight)]))


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.node)
def test_a_compiled_step_takes_another_count_without_another_graph(op: Operator):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    step = Step(next(t for t in targets() if t.backend == "cpu"), op)
    given = (step.rows, step.head, step.labels) if step.linear else (step.rows, step.labels)
    torch._dynamo.reset()
    call = torch.compile(lambda n: op.function(*given, **step.options, num_items=n), backend=backend, fullgraph=True)
    for number in (7, 11):
        expected = step.loss(slice(None), reduction="sum") / number
        torch.testing.assert_close(call(torch.tensor(number)), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "num_items, reduction, error, message",
    [
        (-1, "mean", ValueError, "num_items must be finite and at least 0, got -1"),
        (float("nan"), "sum", ValueError, "num_items must be finite and at least 0, got nan"),
        (3, "none", ValueError, "num_items is given and reduction is 'none'; allowed with it: 'mean', 'sum'"),
        (torch.ones(2), "mean", ValueError, r"num_items is float32 \(2,\); expected one real number"),
        (torch.tensor(True), "mean", ValueError, r"num_items is bool \(\); expected one real number"),
        (True, "mean", TypeError, "num_items must be a number or a tensor of one, got bool"),
        ("3", "sum", TypeError, "num_items must be a number or a tensor of one, got str"),
    ],
)
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_errors_name_argument_given_and_allowed(name: str, num_items, reduction: str, error: type, message: str):
    given = [torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)]
    if name == "linear_cross_entropy":
        given.insert(1, torch.ones(7, 4))
    with pytest.raises(error, match=f"^{name}: {message}"):
        getattr(functional, name)(*given, num_items=num_items, reduction=reduction)
