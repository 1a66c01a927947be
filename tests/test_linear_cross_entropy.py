"""Linear cross-entropy: random shapes, layouts and options; torch.nn as oracle; its memory; errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as torch_functional
from torch.utils.checkpoint import checkpoint

import llmengine
from llmengine import functional
from llmengine.ops import linear_cross_entropy as ops
from llmengine.testing import LAYOUTS, Sample, all_operators, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT, OUTPUT

OPERATOR = next(op for op in all_operators() if op.name == "linear_cross_entropy")
ROOT = Path(__file__).resolve().parent.parent


def make(tokens, d, classes, seed, *, bias=True, weighted=False, ignored=0.0, **options) -> Sample:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    target = torch.randint(classes, (tokens,), generator=g)
    target[torch.rand(tokens, generator=g) < ignored] = -100
    if bias:
        options["linear_bias"] = randn(classes)
    if weighted:
        options["weight"] = randn(classes).abs()
    args = (randn(tokens, d), 3 * max(d, 1) ** -0.5 * randn(classes, d), target)
    return Sample(f"{tokens} x {d} x {classes}", args, options, ("weight",))


def assert_lawful(sample: Sample, given: Sample) -> None:
    """`given` on the CPU backend against float64 and plain PyTorch on `sample`, the same numbers laid out plainly."""
    oracle = evaluate(OPERATOR.function, sample.rounded(torch.float64), "reference")
    plain = evaluate(OPERATOR.plain, sample, None)
    with poison():
        ours = evaluate(OPERATOR.function, given, "cpu")
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{sample.name}: loss")
    for key in oracle[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample.name}: grad {key}")


def test_float32_weight_beside_bfloat16_input():
    """As under autocast: as right as with a bfloat16 weight of the same values; gradients in their tensors' dtypes."""
    half = make(150, 72, 900, 0).rounded(torch.bfloat16)
    mixed = Sample(half.name, (half.args[0], half.args[1].float(), half.args[2]), half.kwargs, half.constants)
    oracle = evaluate(OPERATOR.function, half.rounded(torch.float64), "reference")
    plain, ours = evaluate(OPERATOR.plain, half, None), evaluate(OPERATOR.function, mixed, "cpu")
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, "loss")
    assert ours[1][0].dtype == torch.bfloat16 and ours[1][1].dtype == torch.float32
    for key in oracle[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"grad {key}")


# "none", whose many losses give the law a mean: a single rounding of plain PyTorch's may be none at all.
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tokens=st.integers(40, 230), d=st.integers(16, 70), classes=st.integers(16, 900), seed=st.integers(0, 99),
    bias=st.booleans(), weighted=st.booleans(), ignored=st.sampled_from([0.0, 0.3]),
    label_smoothing=st.sampled_from([0.0, 0.1]), z_loss=st.sampled_from([0.0, 1e-3]),
    softcap=st.sampled_from([0.0, 6.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(sorted(LAYOUTS)),
)  # fmt: skip
def test_law_on_random_shapes_layouts_and_options(tokens, d, classes, seed, dtype, layout, **options):
    sample = make(tokens, d, classes, seed, reduction="none", **options).rounded(dtype)
    assert_lawful(sample, sample.rounded(dtype, LAYOUTS[layout]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 9), d=st.integers(1, 9), classes=st.integers(1, 9), seed=st.integers(0, 99),
    bias=st.booleans(), weighted=st.booleans(), ignored=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]), label_smoothing=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_small_sizes(tokens, d, classes, seed, **options):
    sample = make(tokens, d, classes, seed, **options)
    oracle = evaluate(OPERATOR.function, sample, "reference")
    ours = evaluate(OPERATOR.function, sample.rounded(torch.float32), "cpu")
    for a, b in zip([*ours[0], *ours[1].values()], [*oracle[0], *oracle[1].values()], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens, d, classes", [(2100, 24, 700), (70, 300, 6500), (1025, 16, 1537)], ids=["tokens", "classes", "both"]
)
def test_sizes_past_the_blocks(tokens, d, classes, dtype):
    sample = make(tokens, d, classes, 0, ignored=0.02, reduction="none").rounded(dtype)
    assert_lawful(sample, sample)


def test_equals_a_linear_layer_and_cross_entropy_of_torch():
    torch.manual_seed(0)
    head = torch.nn.Linear(48, 1000)
    x, target = torch.randn(2, 33, 48, requires_grad=True), torch.randint(1000, (2, 33))
    target[0, :9] = -100
    leaves = [x, head.weight, head.bias]
    expected = torch_functional.cross_entropy(head(x).flatten(0, 1), target.flatten(), label_smoothing=0.1)
    with llmengine.backend("cpu"):
        ours = functional.linear_cross_entropy(x, head.weight, target, linear_bias=head.bias, label_smoothing=0.1)
        gradients = torch.autograd.grad(ours, leaves)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_equals_cross_entropy_of_the_logits():
    """Both operators share their rows: with logits that are exact they give equal losses."""
    x, eye = torch.randint(-9, 9, (20, 37)).float(), torch.eye(37)
    target = torch.randint(37, (20,))
    options = {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 5.0, "reduction": "none"}
    with llmengine.backend("cpu"):
        ours = functional.linear_cross_entropy(x, eye, target, **options)
        theirs = functional.cross_entropy(x, target, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gradients_are_equal_bits_for_any_number_of_threads():
    sample = make(1100, 40, 4000, 2, ignored=0.1, label_smoothing=0.1).rounded(torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(evaluate(functional.linear_cross_entropy, sample, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0][0][0], other[0][0])
        assert all(torch.equal(found[0][1][key], other[1][key]) for key in found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_tokens_may_hold_anything(dtype):
    """They enter no product: NaN there changes nothing, and their gradient is zero."""
    sample = make(60, 24, 100, 3, ignored=0.4).rounded(dtype)
    ignored = sample.args[2] == -100
    poisoned = sample.rounded(dtype, torch.clone)
    poisoned.args[0][ignored] = torch.nan
    clean, ours = (evaluate(functional.linear_cross_entropy, s, "cpu") for s in (sample, poisoned))
    assert torch.equal(clean[0][0], ours[0][0])
    assert all(torch.equal(clean[1][key], ours[1][key]) for key in clean[1])
    assert not ours[1][0][ignored].any()


# ---- loss and gradients at once --------------------------------------------------------------------------------------

SIZES = {"one block": (70, 24, 3300), "several blocks": (230, 24, 3300), "few classes": (40, 8, 5)}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of at most 100 tokens of 3,300 classes in float32, of 200 in bfloat16, whatever the processor."""
    monkeypatch.setattr(ops, "TILES", False)
    monkeypatch.setattr(ops, "BLOCK_BYTES", 100 * 3 * ops.CLASS_BLOCK * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_made_with_the_loss(small_blocks, size, reduction, dtype):
    """Beside a float32 weight, as it is under autocast."""
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "weighted": True}
    half = make(*SIZES[size], 5, ignored=0.1, reduction=reduction, **options).rounded(dtype)
    x, w, target = half.args
    given = Sample(half.name, (x, w.float(), target), half.kwargs, half.constants)
    assert ops.at_once(x, w.float(), reduction, 0.0)
    assert_lawful(half, given)


@pytest.mark.parametrize("tokens, classes", [(300_000, 2), (4096, 50257), (10, 2_000_000), (1, 1), (0, 5), (7, 0)])
def test_a_block_is_no_larger_than_it_may_be(tokens, classes):
    x, w = (torch.empty(n, 8, device="meta") for n in (tokens, classes))
    columns = -(-max(classes, 1) // ops.CLASS_BLOCK) * ops.CLASS_BLOCK
    assert ops.block_tokens(x, w) * columns * 4 <= max(ops.BLOCK_BYTES, 4 * columns)


@pytest.mark.parametrize("tokens", [1034, 2050, 4096])
def test_blocks_are_as_good_as_equal(tokens, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK_BYTES", 100 << 20)
    x, w = torch.empty(tokens, 8, device="meta"), torch.empty(50257, 8, device="meta")
    block = ops.block_tokens(x, w)
    blocks = -(-tokens // block)
    assert block * blocks - tokens < blocks * ops.TOKEN_STEP


def test_logits_are_the_same_in_every_block():
    """Of a target that is nearly certain the backward forms the difference of logits and the forward's log-sum-exp, in
    blocks of tokens and of classes whose last ones are small (csrc/cpu/kernels/linear_cross_entropy.cpp)."""
    tokens, classes, d, again = 1030, 1556, 768, 6
    g = torch.Generator().manual_seed(0)
    w, target = torch.randn(classes, d, generator=g) * d**-0.5, torch.randint(classes, (tokens,), generator=g)
    target[:3] = classes - 1  # of the last block of classes
    x = torch.randn(tokens, d, generator=g)
    line = w[target]
    x += (15 - (x * line).sum(1, keepdim=True)) * line / line.square().sum(1, keepdim=True)
    x[-again:], target[-again:] = x[:again], target[:again]
    x.requires_grad_()
    losses = functional.linear_cross_entropy(x, w, target, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x)
    apart = (grad[-again:] - grad[:again]).norm(dim=1) / grad[:again].norm(dim=1)
    assert apart.max() < 1e-5
    exact = x.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact @ w.double().T, target, reduction="sum")
    (expected,) = torch.autograd.grad(loss, exact)
    errors = (grad.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 8 * errors.median()


def test_a_weight_of_16_bits_is_summed_once(small_blocks):
    x, w = torch.ones(230, 24).bfloat16(), torch.ones(3300, 24).bfloat16().requires_grad_()
    assert not ops.at_once(x, w, "mean", 0.0) and ops.at_once(x[:190], w, "mean", 0.0)
    assert ops.at_once(x, w.detach(), "mean", 0.0) and not ops.at_once(x, w.float(), "mean", 0.0, main=w.float())
    assert not ops.at_once(x.half(), w.half(), "mean", 0.0) and not ops.at_once(x.float(), w.float(), "none", 0.0)
    assert not ops.at_once(x.float(), w.float(), "mean", 5.0)
    sample = make(190, 24, 3300, 6, ignored=0.1).rounded(torch.bfloat16)
    assert_lawful(sample, sample)
    frozen = make(230, 24, 3300, 6, ignored=0.1).rounded(torch.bfloat16)
    frozen = Sample(frozen.name, frozen.args, frozen.kwargs, (1, *frozen.constants))
    assert_lawful(frozen, frozen)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(small_blocks, wanted):
    sample = make(230, 24, 3300, 7).rounded(torch.float32)
    leaves = [
        t.requires_grad_(want) for t, want in zip((*sample.args[:2], sample.kwargs["linear_bias"]), wanted, strict=True)
    ]
    ours = functional.linear_cross_entropy(*leaves[:2], sample.args[2], linear_bias=leaves[2])
    ours.backward()
    plain = torch_functional.cross_entropy(torch_functional.linear(*leaves), sample.args[2])
    (leaf,) = (t for t in leaves if t.requires_grad)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(plain, leaf)[0], rtol=1e-4, atol=1e-7)


def test_the_backward_may_run_again_and_scales():
    sample = make(50, 24, 300, 8).rounded(torch.float32)
    leaves = [t.requires_grad_() for t in sample.args[:2]]
    loss = functional.linear_cross_entropy(*leaves, sample.args[2])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in torch.autograd.grad(0.25 * loss, leaves, retain_graph=True):
        assert torch.equal(g, 0.25 * kept.pop(0))
    loss.backward(retain_graph=True)
    for leaf in leaves:
        leaf.grad.mul_(3)  # as clipping in place does
    loss.backward()
    for leaf, g in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * g)


def test_logits_that_are_recomputed_may_lie_under_a_checkpoint():
    """As those of which gradients are made with the loss: tests/test_ops.py."""
    sample = make(20, 8, 50, 9).rounded(torch.float32)
    x, w, target = sample.args
    leaves = [t.requires_grad_() for t in (x, w, sample.kwargs["linear_bias"])]

    def loss(x, w, bias):
        return functional.linear_cross_entropy(x, w, target, linear_bias=bias, reduction="none").sum()

    found = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_gradients_that_wait_for_a_factor_are_what_they_are_said_to_be(dtype):
    x, w, target = make(6, 8, 9, 10).rounded(dtype).args
    node = torch.ops.llmengine.linear_cross_entropy_with_gradients.default
    torch.library.opcheck(node, (x, w, None, target, None, "mean", -100, 0.0, 0.0, 0.0, 4, True, [True, True, False]))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_serves_any_number_of_tokens(dynamic, monkeypatch):
    """Where gradients are made with the loss, too, though how many tokens are taken at a time is theirs."""
    monkeypatch.setattr(ops, "TILES", False)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(functional.linear_cross_entropy, fullgraph=True, dynamic=dynamic, backend=count)
    for tokens in (20, 21, 33, 47, 64):
        sample = make(tokens, 8, 50, tokens).rounded(torch.float32)
        x, w, target = (t.requires_grad_(t.is_floating_point()) for t in sample.args)
        assert ops.at_once(x, w, "mean", 0.0)
        ours, plain = (f(x, w, target, label_smoothing=0.1) for f in (compiled, functional.linear_cross_entropy))
        for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(plain, (x, w)), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) <= (1 if dynamic else 2)  # the second once the number was seen to vary


PEAK = r"""
import re, sys, torch, llmengine
from llmengine import functional
backend, tokens, classes, d = sys.argv[1], *map(int, sys.argv[2:])
def call(tokens, classes):
    x, w = torch.randn(tokens, d, requires_grad=True), torch.randn(classes, d, requires_grad=True)
    target = torch.randint(classes, (tokens,))
    # not ru_maxrss, which begins at what the process that started this one has
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
    before = peak()
    with llmengine.backend(backend):
        functional.linear_cross_entropy(x, w, target).backward()
    return peak() - before - 4 * (x.numel() + w.numel()) / 2**20
call(8, 8)
print(call(tokens, classes))
"""


def peak_mib(backend: str, tokens: int, classes: int) -> float:
    """What one forward and backward raises the peak of a fresh process by, beyond the gradients that it returns."""
    command = [sys.executable, "-c", PEAK, backend, str(tokens), str(classes), "32"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def test_memory_does_not_grow_with_tokens_times_classes():
    """Beyond what one block may take: logits are 128 MiB and 1 GiB in float32."""
    small, large = peak_mib("cpu", 2048, 16384), peak_mib("cpu", 8192, 32768)
    logits = 4 * (8192 * 32768 - 2048 * 16384) / 2**20  # what they differ by: 896 MiB
    held = peak_mib("reference", 4096, 32768)
    assert held > 4 * 4096 * 32768 / 2**20  # the measure sees logits where they are held
    assert large - small < 0.05 * logits and large < 1.1 * ops.BLOCK_BYTES / 2**20


@pytest.mark.parametrize(
    "change, message",
    [
        ({"linear_weight": torch.ones(7, 5)}, r"linear_weight has shape \(7, 5\); expected \(classes, 4\)"),
        ({"linear_bias": torch.ones(4)}, r"linear_bias has shape \(4,\); expected \(7,\)"),
        ({"weight": torch.ones(4)}, r"weight has shape \(4,\)"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target has shape \(4,\)"),
        ({"target": torch.zeros(3)}, "target has dtype float32"),
        ({"target": torch.tensor([0, 7, 1])}, r"target 7 at row 1 is out of range; allowed: 0 to 6 \(7 classes\)"),
        ({"target": torch.tensor([0, 1, -1])}, "target -1 at row 2 is out of range"),
        ({"reduction": "max"}, "reduction is 'max'; allowed: 'none', 'mean', 'sum'"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\]"),
        ({"z_loss": -1.0}, "z_loss must be finite and at least 0"),
        ({"softcap": -1.0}, "softcap must be finite and at least 0"),
        ({"input": torch.ones(())}, r"input has shape \(\); expected \(\*, d\)"),
        ({"linear_weight": torch.ones(7, 4).bfloat16()}, "linear_weight has dtype bfloat16; allowed: that of input"),
    ],
)
def test_errors_name_argument_given_and_allowed(change, message):
    arguments = {"input": torch.ones(3, 4), "linear_weight": torch.ones(7, 4), "target": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        functional.linear_cross_entropy(**arguments | change)
