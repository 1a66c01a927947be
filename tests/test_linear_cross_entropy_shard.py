"""Linear cross-entropy of shards of the classes that processes hold, beside the loss of one process that holds all."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, multiprocessing
from vocabulary_shards import CLASSES, PLACES, SPLITS, samples, upstream, work

import llmengine
from llmengine import functional
from llmengine.functional import VocabularyShard
from llmengine.testing import Sample, assert_law
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.samples import linear_cross_entropy


@pytest.fixture(scope="module", params=SPLITS, ids=lambda ranks: f"{ranks} processes")
def of_ranks(request, tmp_path_factory) -> list[dict[str, Tensor]]:
    """What the processes have got: they start once for all cases."""
    directory = tmp_path_factory.mktemp("shards")
    multiprocessing.spawn(work, (request.param, str(directory)), request.param)
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(request.param)]


def of_one(sample: Sample, function) -> dict[str, Tensor]:
    x, weight, target = sample.args
    leaves = {"input": x.clone(), "weight": weight.clone()}
    options = dict(sample.kwargs)
    if "linear_bias" in options:
        leaves["bias"] = options["linear_bias"] = options["linear_bias"].clone()
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss = function(leaves["input"], leaves["weight"], target, **options)
    loss.backward(upstream(loss))
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def together(of_ranks: list[dict[str, Tensor]], key: str, *, summed: bool) -> dict[str, Tensor]:
    """What the ranks have of one case: each the same loss and gradient of the input, and its part of the head's."""
    ours = [{name.removeprefix(key): t for name, t in rank.items() if name.startswith(key)} for rank in of_ranks]
    found = {name: torch.cat([rank[name] for rank in ours]) for name in ("weight", "bias") if name in ours[0]}
    for rank in ours[1:]:
        assert torch.equal(rank["loss"], ours[0]["loss"])
        assert not summed or torch.equal(rank["input"], ours[0]["input"])
    found["input"] = ours[0]["input"] if summed else torch.stack([rank["input"] for rank in ours]).sum(0)
    return found | {"loss": ours[0]["loss"]}


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.name)
def test_shards_give_the_loss_and_gradients_of_the_whole(sample: Sample, of_ranks):
    """In float64 those of plain PyTorch; in others by the law that one process obeys."""
    exact = of_one(sample, linear_cross_entropy.plain)
    for backend, dtype in PLACES:
        given = sample.rounded(dtype)
        plain = of_one(given, linear_cross_entropy.plain)
        with llmengine.backend("reference"):
            oracle = of_one(given.rounded(torch.float64), functional.linear_cross_entropy)
        for split in SPLITS[len(of_ranks)]:
            found = together(of_ranks, f"{dtype}/{sample.name}/{split}/True/", summed=True)
            assert found.keys() == oracle.keys()
            for name, tensor in found.items():
                what = f"{sample.name} {backend} {dtype} {split}: {name}"
                if dtype == torch.float64:
                    torch.testing.assert_close(tensor, exact[name], rtol=1e-11, atol=1e-11, msg=lambda m, w=what: w + m)
                else:
                    bound = OUTPUT if name == "loss" else GRADIENT
                    assert_law(tensor, plain[name], oracle[name], bound, what)


def test_parts_of_the_inputs_gradient_are_the_callers_to_sum(of_ranks):
    """Where it asks for that: their sum is the whole one."""
    for sample in samples()[:2]:
        for split in SPLITS[len(of_ranks)]:
            key = f"{torch.float64}/{sample.name}/{split}"
            parts, whole = (together(of_ranks, f"{key}/{summed}/", summed=summed) for summed in (False, True))
            torch.testing.assert_close(parts["input"], whole["input"], rtol=1e-12, atol=1e-12)
            assert any(not torch.equal(rank[f"{key}/False/input"], whole["input"]) for rank in of_ranks)


def test_splits_leave_shards_empty_and_without_a_label(of_ranks):
    splits = SPLITS[len(of_ranks)]
    assert any(a == b for split in splits for a, b in zip(split, (*split[1:], CLASSES), strict=True))
    (few,) = [s for s in samples() if s.name == "few classes"]
    assert any(split[-1] > int(few.args[2].max()) and split[-1] < CLASSES for split in splits)


def whole(**options) -> tuple:
    (sample,) = [s.rounded(torch.float32) for s in samples() if s.name == "none everything"]
    return sample.args, sample.kwargs | {"shard": VocabularyShard(0, CLASSES)} | options


def test_a_logit_that_is_nan_or_infinite_reaches_the_losses():
    (x, weight, target), options = whole()
    for value in (torch.nan, torch.inf):
        spoiled = weight.clone()
        spoiled[3] = value
        losses = functional.linear_cross_entropy(x, spoiled, target, **options)
        assert losses[7:].isnan().all() and not losses[:7].any()


def in_turn(x: Tensor, head: Tensor, target: Tensor, bias: Tensor, cut: int, **options) -> Tensor:
    """The loss of two shards of this process, by a collective of its own: they come one after the other and hear what
    the other one said the last time; what is said second depends on what was heard first."""
    heard: dict[tuple[int, int], Tensor] = {}
    combine = {"max": torch.maximum, "sum": torch.add}
    for turn in range(4):
        first, end = (0, cut) if turn % 2 == 0 else (cut, CLASSES)
        numbers = iter(range(2))

        def reduce(tensor: Tensor, what: str, first=first, numbers=numbers) -> None:
            number = next(numbers)
            heard[first, number] = tensor.clone()
            if (cut - first, number) in heard:
                tensor.copy_(combine[what](tensor, heard[cut - first, number]))

        shard = VocabularyShard(first, CLASSES, reduce)
        loss = functional.linear_cross_entropy(
            x, head[first:end], target, linear_bias=bias[first:end], shard=shard, **options
        )
    return loss


def test_a_function_puts_the_shards_together():
    (x, weight, target), options = whole()
    bias, _ = options.pop("linear_bias"), options.pop("shard")
    expected = functional.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)
    torch.testing.assert_close(in_turn(x, weight, target, bias, 50, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ruled_out", [20, 50, 60], ids=["some of a shard", "a whole one", "and some of the other"])
def test_classes_that_are_ruled_out(ruled_out: int):
    """By a bias of -inf."""
    (x, weight, target), options = whole(label_smoothing=0.0, softcap=0.0)
    bias, _ = options.pop("linear_bias"), options.pop("shard")
    bias = torch.where(torch.arange(CLASSES) < ruled_out, -torch.inf, bias)
    target = torch.where(target == 1, 1, target.clamp(min=ruled_out))
    expected = functional.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)
    assert expected.isfinite().all()
    torch.testing.assert_close(in_turn(x, weight, target, bias, 50, **options), expected, rtol=1e-5, atol=1e-5)


def test_compiled_with_a_collective():
    """The other shard is as this one: sums are twice what they are here, and so the loss of a token is ln 2 more."""
    (x, weight, target), options = whole(label_smoothing=0.0, softcap=0.0)
    options |= {"z_loss": 0.0, "linear_bias": None}
    alone = functional.linear_cross_entropy(x, weight, target, **options)
    calls = []

    def reduce(tensor: Tensor, what: str) -> None:
        calls.append(what)
        if what == "sum":
            tensor[:1] *= 2

    options["shard"] = VocabularyShard(0, CLASSES, reduce, sum_input_gradient=False)
    torch._dynamo.reset()
    for call in (
        functional.linear_cross_entropy,
        torch.compile(functional.linear_cross_entropy, backend="aot_eager"),
    ):
        calls.clear()
        loss = call(x, weight, target, **options)
        assert calls == ["max", "sum"]
        assert 0.5 < loss - alone < 0.7 if options.get("reduction", "mean") == "mean" else loss.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"shard": VocabularyShard(1, CLASSES)},
            r"shard has classes 1 to 92, by linear_weight's 91 rows; exp",
        ),
        ({"shard": VocabularyShard(0, CLASSES + 1)}, r"shard has 91 of 92 classes and no reduce"),
        (
            {"weight": torch.ones(50), "shard": VocabularyShard(0, 100, lambda *_: None)},
            r"weight has shape \(50,\); expected \(100,\)",
        ),
        (
            {"target": torch.full((60,), CLASSES)},
            r"target 91 at row 0 is out of range; allowed: 0 to 90 \(91 c",
        ),
        ({"linear_bias": torch.ones(3)}, r"linear_bias has shape \(3,\); expected \(91,\)"),
    ],
)
def test_errors_name_argument_given_and_allowed(change, message):
    (x, weight, target), options = whole()
    arguments = {"input": x, "linear_weight": weight, "target": target} | options | change
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        functional.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("given", [("0", 7), (0, None), (-1, 7), (0.0, 7)])
def test_a_shard_is_of_whole_numbers(given):
    with pytest.raises(ValueError, match=r"^VocabularyShard: (first|classes) is .*; expected a whole number, 0 or"):
        VocabularyShard(*given)


def test_a_shard_is_nothing_else():
    (x, weight, target), options = whole()
    with pytest.raises(TypeError, match=r"^linear_cross_entropy: shard is a int; expected a VocabularyShard or None"):
        functional.linear_cross_entropy(x, weight, target, **(options | {"shard": 3}))
