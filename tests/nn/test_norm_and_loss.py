"""LayerNorm, RMSNorm, Embedding and the losses against torch.nn's."""

from __future__ import annotations

import pytest
import torch

from llmengine import Transformer, TransformerConfig, nn
from llmengine.ops import linear_cross_entropy as ops
from llmengine.testing import assert_near

from .peers import compare, pair, randn

ROWS, CLASSES = 7, 5


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"elementwise_affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", [8, (8,), (3, 8), [3, 8]], ids=str)
def test_layer_norm(shape, options):
    compare(*pair("LayerNorm", shape, **options), randn(2, 3, 8))


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [8, (3, 8)], ids=str)
def test_rms_norm(shape, options):
    if "eps" not in options:
        # the default differs with the dtype: float64's is compared here, float32's by the samples of tests/test_ops.py
        ours, theirs = pair("RMSNorm", shape, **options)
        assert_near(ours(randn(2, 3, 8)), theirs(randn(2, 3, 8)), 1e-12)
    compare(*pair("RMSNorm", shape, **options), randn(2, 3, 8))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}], ids=str)
@pytest.mark.parametrize("shape", [(), (9,), (2, 3, 4)], ids=str)
def test_embedding(shape, options):
    ids = torch.randint(5, shape, generator=torch.Generator().manual_seed(1))
    compare(*pair("Embedding", 5, 7, **options), ids)


def test_an_embedding_of_given_rows_is_frozen_as_pytorchs():
    rows = randn(4, 3)
    ours = nn.Embedding.from_pretrained(rows, padding_idx=0)
    assert isinstance(ours, nn.Embedding) and not ours.weight.requires_grad
    assert torch.equal(ours(torch.tensor([3, 0])), rows[[3, 0]])


def targets(*shape: int, ignored: int | None = -100) -> torch.Tensor:
    target = torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(0))
    if ignored is not None and target.numel() > 2:
        target.view(-1)[::3] = ignored
    return target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(), (ROWS,), (2, 3), (2, 3, 4)], ids=str)
def test_cross_entropy_loss(shape, weighted, smoothing, reduction):
    weight = torch.rand(CLASSES) + 0.5 if weighted else None
    losses = pair("CrossEntropyLoss", weight, ignore_index=2, reduction=reduction, label_smoothing=smoothing)
    logits = randn(*shape[:1], CLASSES, *shape[1:])
    compare(*losses, logits, targets(*shape, ignored=2))


@pytest.mark.parametrize(("options", "expected"), [({"size_average": False}, "sum"), ({"reduce": False}, "none")])
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_cross_entropy_loss_obeys_the_old_options(options, expected):
    assert nn.CrossEntropyLoss(**options).reduction == torch.nn.CrossEntropyLoss(**options).reduction == expected


class LinearThenLoss(torch.nn.Module):
    """The oracle where PyTorch has no LinearCrossEntropyLoss; the same state_dict."""

    def __init__(self, in_features, num_classes, *, bias, weight, ignore_index, **options):
        super().__init__()
        self.register_buffer("weight", weight)
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias)
        self.options = options | {"ignore_index": -100 if ignore_index is None else ignore_index}

    def forward(self, input, target):
        return torch.nn.functional.cross_entropy(self.linear(input), target, self.weight, **self.options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("ignored", [None, 2])
@pytest.mark.parametrize("rows", [(), (ROWS,)], ids=str)
def test_linear_cross_entropy_loss(rows, ignored, smoothing, reduction):
    options = {
        "bias": smoothing > 0,
        "weight": None if ignored is None else torch.rand(CLASSES) + 0.5,
        "ignore_index": ignored,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    target = targets(*rows, ignored=-100 if ignored is None else ignored)
    ours = nn.LinearCrossEntropyLoss(8, CLASSES, **options).double()
    for make in {getattr(torch.nn, "LinearCrossEntropyLoss", LinearThenLoss), LinearThenLoss}:
        theirs = make(8, CLASSES, **options).double()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        compare(ours, theirs, randn(*rows, 8), target)


def test_memory_or_speed_of_logits_is_asked_for_at_any_time(monkeypatch):
    """On a GPU `at_once` decides by it, so here what it is given is looked at."""
    asked = []
    monkeypatch.setattr(ops, "at_once", lambda *given: asked.append(given[4]))
    module = nn.LinearCrossEntropyLoss(8, CLASSES)
    sizes = {"vocab_size": CLASSES, "d_model": 8, "n_heads": 2, "n_layers": 1, "d_ff": 8}
    config = TransformerConfig.preset("gpt2", **sizes, bos_token_id=None, eos_token_id=None)
    model, ids = Transformer(config), targets(2, 4, ignored=None)
    for wanted in (False, True):
        module.recompute = model.token_head.recompute = wanted
        module(randn(ROWS, 8).float(), targets(ROWS)).backward()
        model(ids, labels=ids).loss.backward()
    assert asked == [False, False, True, True]


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "LinearCrossEntropyLoss"])
def test_a_mean_over_no_labels_is_zero(name):
    module = nn.CrossEntropyLoss() if name == "CrossEntropyLoss" else nn.LinearCrossEntropyLoss(CLASSES, 3)
    x = torch.randn(4, CLASSES, requires_grad=True)
    loss = module(x, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0.0 and (x.grad == 0).all()


@pytest.mark.parametrize(
    ("module", "input", "target", "message"),
    [
        (nn.CrossEntropyLoss(), randn(4, 5), torch.zeros(3).long(), r"target has shape \(3,\); expected \(4,\)"),
        (nn.CrossEntropyLoss(), randn(4, 5), randn(4, 5), "class probabilities are not supported"),
        (nn.CrossEntropyLoss(), randn(4, 5), torch.tensor([0, 1, 5, 0]), "target"),
        (nn.CrossEntropyLoss(torch.ones(4)), randn(4, 5), torch.zeros(4).long(), r"weight has shape \(4,\)"),
        (nn.LinearCrossEntropyLoss(5, 3), randn(4, 5), torch.zeros(3).long(), r"target has shape \(3,\)"),
        (nn.LinearCrossEntropyLoss(5, 3), randn(4, 5), randn(4), "class probabilities"),
        (nn.LinearCrossEntropyLoss(5, 3).double(), randn(4, 6), torch.zeros(4).long(), r"linear_weight has shape"),
        (nn.LayerNorm(5), torch.ones(3, 4), None, r"normalized_shape \(5,\) is not the end of input's shape \(3, 4\)"),
        (nn.RMSNorm((2, 4)), torch.ones(3, 4), None, r"normalized_shape \(2, 4\) is not the end of input's shape"),
        (nn.LayerNorm(4), torch.ones(3, 4).long(), None, "input has dtype int64"),
    ],
)
def test_bad_inputs_are_named(module, input, target, message):
    with pytest.raises(ValueError, match=message):
        module(input) if target is None else module(input, target)
