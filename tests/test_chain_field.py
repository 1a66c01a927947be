"""The chain field beside the enumeration of all sequences of tags and beside pytorch-crf; ties, what cannot be, NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.testing import assert_near, evaluate, poison, targets
from llmengine.testing.sample import Sample
from llmengine.testing.samples.chain_field import OPERATORS, arguments, blocks, rows_of

LOSS, DECODE = OPERATORS
BACKENDS = ["reference", *(t.backend for t in targets() if t.device == "cpu" and t.has(LOSS))]
ON = pytest.mark.parametrize("backend", BACKENDS)
INFINITY = math.inf


def single(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same in float32, where every backend runs."""
    return tuple(a.float() if a.is_floating_point() else a for a in args)


def decode(args: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor]:
    with llmengine.backend(backend), poison():
        return functional.chain_field_decode(args[0], *args[2:], return_scores=True)


def scores_of(
    emissions: Tensor, transition: Tensor, start: Tensor, end: Tensor
) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every sequence of tags and its score, in the order of Viterbi's preference: by last tags, then those before."""
    length, k = emissions.shape
    every = sorted(itertools.product(range(k), repeat=length), key=lambda y: y[::-1])
    y = torch.tensor(every)
    total = start[y[:, 0]] + emissions[torch.arange(length), y].sum(1) + end[y[:, -1]]
    return every, total + transition[y[:, :-1], y[:, 1:]].sum(1)


def enumerated_losses(emissions, tags, transition, start, end, cu_seqlens) -> Tensor:
    losses = []
    for first, last in itertools.pairwise(cu_seqlens.tolist()):
        if first == last:
            losses.append(emissions.new_zeros(()))
            continue
        every, scores = scores_of(emissions[first:last], transition, start, end)
        losses.append(scores.logsumexp(0) - scores[every.index(tuple(tags[first:last].tolist()))])
    return torch.stack(losses)


# ---- beside the enumeration ------------------------------------------------------------------------------------------


@ON
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_losses_and_gradients_are_those_of_the_enumeration(backend: str, k: int):
    sample = Sample("enumerated", arguments(k, [5, 1, 0, 3, 2], 1, seed=k))
    expected = evaluate(enumerated_losses, sample, None)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        if dtype == torch.float64 and backend != "reference":
            continue
        with poison():
            found = evaluate(functional.chain_field_loss, sample.rounded(dtype), backend)
        assert_near(found[0][0].double(), expected[0][0], tolerance)
        for key, gradient in found[1].items():
            assert_near(gradient.double(), expected[1][key], tolerance, f"gradient {key}")


@ON
def test_what_is_forbidden_has_no_probability_and_no_gradient(backend: str):
    emissions, _, transition, start, end, cu_seqlens = arguments(5, [4, 2, 1])
    moves, starts = blocks(5)
    args = (emissions, torch.tensor([1, 2, 0, 3, 0, 1, 3]), transition + moves, start + starts, end, cu_seqlens)
    expected = evaluate(enumerated_losses, Sample("enumerated", args), None)
    found = evaluate(functional.chain_field_loss, Sample("forbidden", args).rounded(torch.float32), backend)
    assert_near(found[0][0].double(), expected[0][0], 3e-6)
    for key, gradient in found[1].items():
        assert_near(gradient.double(), expected[1][key], 3e-6, f"gradient {key}")
    assert (found[1][2][moves == -INFINITY] == 0).all() and (found[1][3][starts == -INFINITY] == 0).all()


@ON
def test_paths_that_are_likely_from_one_side_alone(backend: str):
    """What a token wants most its next one forbids: products of exponentials are 0 in float32, the answer is not."""
    emissions, tags, transition, start, end, cu_seqlens = arguments(4, [5, 3])
    emissions[:, 3] += 200.0
    transition[3, :] = -INFINITY
    emissions[torch.arange(8) % 2 == 1, 2] += 130.0
    transition[:, 2] -= 90.0
    sample = Sample("opposed", (emissions, tags.clamp(max=2), transition, start, end, cu_seqlens)).rounded(
        torch.float32
    )
    expected = evaluate(enumerated_losses, sample.rounded(torch.float64), None)
    found = evaluate(functional.chain_field_loss, sample, backend)
    # emissions of 200 are known to 1.5e-5
    assert_near(found[0][0].double(), expected[0][0], 1e-5)
    for key, gradient in found[1].items():
        assert_near(gradient.double(), expected[1][key], 1e-4, f"gradient {key}")


@ON
def test_the_best_tags_are_those_of_the_enumeration_also_in_ties(backend: str):
    """Scores are small integers: nearly every sequence of tags has an equal."""
    tied = 0
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        lengths, k = [4, 1, 0, 5], 3
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        shapes = ((sum(lengths), k), (k, k), (k,), (k,))
        emissions, transition, start, end = (torch.randint(-1, 2, shape, generator=g).float() for shape in shapes)
        tags, scores = decode((emissions, None, transition, start, end, cu_seqlens), backend)
        for s, (row, found) in enumerate(zip(emissions.split(lengths), tags.split(lengths), strict=True)):
            if not len(row):
                assert scores[s] == 0
                continue
            every, all_scores = scores_of(row, transition, start, end)
            assert tuple(found.tolist()) == every[int(all_scores.argmax())]
            assert scores[s] == all_scores.max()
            tied += int((all_scores == all_scores.max()).sum() > 1)
    assert tied >= 6


def test_all_backends_decode_to_the_same_bits():
    for k, lengths in ((2, [9, 0, 4]), (9, [30, 1, 7]), (20, [15, 8]), (65, [6])):
        args = single(arguments(k, lengths, 1, seed=k))
        results = [decode(args, backend) for backend in BACKENDS]
        for tags, scores in results[1:]:
            assert torch.equal(tags, results[0][0]) and torch.equal(scores, results[0][1])


# ---- beside pytorch-crf ----------------------------------------------------------------------------------------------


@ON
@pytest.mark.parametrize("k", [3, 9, 45])
def test_it_is_pytorch_crf(backend: str, k: int):
    import torchcrf  # of the test extra: missing, it is a failure and no silent skip

    lengths = [12, 7, 1, 5]
    args = single(arguments(k, lengths, seed=3))
    emissions, tags, transition, start, end, cu_seqlens = args
    peer = torchcrf.CRF(k, batch_first=True)
    with torch.no_grad():
        for mine, theirs in (
            (transition, peer.transitions),
            (start, peer.start_transitions),
            (end, peer.end_transitions),
        ):
            theirs.copy_(mine)
    counts = torch.tensor(lengths)
    mask = torch.arange(12) < counts[:, None]
    padded = rows_of(emissions, counts).requires_grad_()
    losses = -peer(padded, rows_of(tags, counts), mask=mask, reduction="none")
    expected = torch.autograd.grad(
        losses.sum(), [padded, peer.transitions, peer.start_transitions, peer.end_transitions]
    )
    leaves = [x.clone().requires_grad_() for x in (emissions, transition, start, end)]
    with llmengine.backend(backend):
        ours = functional.chain_field_loss(leaves[0], tags, *leaves[1:], cu_seqlens)
        found = torch.autograd.grad(ours.sum(), leaves)
    assert_near(ours, losses, 1e-6)
    for mine, theirs in zip(found, (expected[0][mask], *expected[1:]), strict=True):
        assert_near(mine, theirs, 2e-6)
    best, _ = decode(args, backend)
    assert best.tolist() == list(itertools.chain(*peer.decode(padded, mask=mask)))


# ---- lengths, threads ------------------------------------------------------------------------------------------------


@ON
def test_random_lengths_one_by_one_and_together(backend: str):
    g = torch.Generator().manual_seed(5)
    for k in (2, 7, 18):
        lengths = torch.randint(0, 9, (6,), generator=g).tolist()
        emissions, tags, *field, cu_seqlens = single(arguments(k, lengths, seed=k))
        with llmengine.backend(backend):
            together = functional.chain_field_loss(emissions, tags, *field, cu_seqlens)
            best = functional.chain_field_decode(emissions, *field, cu_seqlens)
            for s, (x, y) in enumerate(zip(emissions.split(lengths), tags.split(lengths), strict=True)):
                ends = torch.tensor([0, lengths[s]], dtype=torch.int32)
                assert torch.equal(functional.chain_field_loss(x, y, *field, ends), together[s : s + 1])
                found = functional.chain_field_decode(x, *field, ends)
                assert torch.equal(found, best.split(lengths)[s])


def test_gradients_do_not_depend_on_the_number_of_threads():
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 60, (64,), generator=g).tolist()
    sample = Sample("many", arguments(20, lengths)).rounded(torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(evaluate(functional.chain_field_loss, sample, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for outputs, gradients in results[1:]:
        assert torch.equal(outputs[0], results[0][0][0])
        assert all(torch.equal(gradients[k], results[0][1][k]) for k in gradients)


# ---- what is no score, and no argument -------------------------------------------------------------------------------


@ON
def test_tags_that_cannot_be_cost_infinity_and_finite_gradients(backend: str):
    emissions, tags, transition, start, end, cu_seqlens = single(arguments(3, [3, 3, 2]))
    tags = torch.tensor([0, 1, 0, 2, 2, 2, 0, 0])
    transition[0, 1] = -INFINITY  # what the first sequence's tags do
    emissions[6] = -INFINITY  # the third sequence has no way through
    leaves = [x.clone().requires_grad_() for x in (emissions, transition, start, end)]
    with llmengine.backend(backend), poison():
        losses = functional.chain_field_loss(leaves[0], tags, *leaves[1:], cu_seqlens)
        gradients = torch.autograd.grad(losses, leaves, torch.ones(3))
    assert losses[[0, 2]].tolist() == [INFINITY] * 2 and losses[1].isfinite()
    assert all(g.isfinite().all() for g in gradients)
    assert torch.equal(gradients[0][6:], torch.tensor([[-1.0, 0.0, 0.0]] * 2))
    best, scores = decode((emissions, tags, transition, start, end, cu_seqlens), backend)
    assert best[6:].tolist() == [-1, -1] and (best[:6] >= 0).all()
    assert scores[2] == -INFINITY and scores[:2].isfinite().all()


@ON
@pytest.mark.parametrize("bad", [math.nan, INFINITY])
@pytest.mark.parametrize("where", ["emissions", "transition", "start", "end"])
def test_nan_and_infinity_are_told(backend: str, bad: float, where: str):
    names = ("emissions", "tags", "transition", "start", "end", "cu_seqlens")
    args = dict(zip(names, single(arguments(3, [3, 1, 0, 2])), strict=True))
    args[where][1 if where in ("start", "end") else (1, 1)] = bad
    reached = {"emissions": [0], "transition": [0, 3], "start": [0, 1, 3], "end": [0, 1, 3]}[where]
    untouched = [s for s in range(4) if s not in reached]
    with llmengine.backend(backend):
        losses = functional.chain_field_loss(*args.values())
    best, scores = decode(tuple(args.values()), backend)
    for found in (losses, scores):
        assert found[reached].isnan().all() and found[untouched].isfinite().all()
    for s, tags in enumerate(best.split([3, 1, 0, 2])):
        assert (tags == -1).all() if s in reached else (tags >= 0).all()


@ON
def test_tokens_past_the_last_boundary_belong_to_nothing(backend: str):
    args = single(arguments(4, [3, 2], beyond=3))
    args[0][5:], args[1][5:] = math.nan, 99
    emissions = args[0].clone().requires_grad_()
    with llmengine.backend(backend), poison():
        losses = functional.chain_field_loss(emissions, *args[1:])
        (gradient,) = torch.autograd.grad(losses.sum(), emissions)
    assert losses.isfinite().all() and gradient[:5].isfinite().all() and (gradient[5:] == 0).all()
    assert decode(args, backend)[0][5:].tolist() == [-1] * 3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "position, value, problem",
    [
        (1, torch.tensor([0, 1, 3, 0]), r"tags has 3 at token 2; allowed: 0 to 2 \(3 tags\)"),
        (1, torch.tensor([0, -1, 2, 0]), r"tags has -1 at token 1"),
        (5, torch.tensor([1, 3, 4], dtype=torch.int32), "cu_seqlens must begin with 0, got 1"),
        (5, torch.tensor([0, 3, 2], dtype=torch.int32), "cu_seqlens gives sequence 1 -1 tokens: it must never fall"),
        (5, torch.tensor([0, 3, 5], dtype=torch.int32), "cu_seqlens ends at 5, past the 4 tokens"),
    ],
)
def test_what_the_kernels_can_read_is_checked(backend: str, position: int, value: Tensor, problem: str):
    args = list(single(arguments(3, [3, 1])))
    args[position] = value
    with llmengine.backend(backend), pytest.raises(ValueError, match=problem):
        functional.chain_field_loss(*args)


@pytest.mark.parametrize(
    "position, value, problem",
    [
        (0, torch.zeros(4), r"emissions has shape \(4,\); expected \(tokens, K\) with at least one tag"),
        (0, torch.zeros(4, 0), r"emissions has shape \(4, 0\)"),
        (0, torch.zeros(4, 3, dtype=torch.int64), "emissions has dtype int64"),
        (1, torch.zeros(3, dtype=torch.int64), r"tags has shape \(3,\); expected \(4,\)"),
        (1, torch.zeros(4), "tags has dtype float32"),
        (2, torch.zeros(3, 4), r"transition has shape \(3, 4\); expected \(3, 3\)"),
        (3, torch.zeros(3, dtype=torch.float64), "start has dtype float64"),
        (4, torch.zeros(2), r"end has shape \(2,\); expected \(3,\)"),
        (5, torch.tensor([0, 4]), r"cu_seqlens must be int32 of shape \(sequences \+ 1,\), got int64 \(2,\)"),
        (5, torch.zeros(0, dtype=torch.int32), r"cu_seqlens must be int32 of shape \(sequences \+ 1,\)"),
        (2, torch.zeros(3, 3, device="meta"), "transition is on meta but emissions is on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_named(position: int, value: Tensor, problem: str):
    args = list(single(arguments(3, [3, 1])))
    args[position] = value
    with pytest.raises(ValueError, match=f"chain_field_loss: {problem}"):
        functional.chain_field_loss(*args)


def test_a_gpu_answers_nan_where_a_cpu_raises():
    """Triton's kernels do not wait to say that a tag is none; more tags than they hold are a refusal."""
    device = next(t.device for t in targets() if t.backend == "triton")
    emissions, tags, *rest = (a.to(device) for a in single(arguments(3, [2, 2])))
    tags[0] = 7
    emissions.requires_grad_()
    with llmengine.backend("triton"):
        losses = functional.chain_field_loss(emissions, tags, *rest)
        assert losses.isnan().tolist() == [True, False]
        (gradient,) = torch.autograd.grad(losses.sum(), emissions)
        assert gradient[0].isnan().all() and gradient[2:].isfinite().all()
        wide, _, *rest = (a.to(device) for a in single(arguments(129, [2])))
        with pytest.raises(RuntimeError, match="takes up to 128 tags, got 129"):
            functional.chain_field_decode(wide, *rest)
