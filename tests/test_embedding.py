"""Embedding: what it refuses, and where its gradient is better than PyTorch's. Its laws are in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as torch_functional

import llmengine
from llmengine import functional
from llmengine.testing import Target, targets

IDS, WEIGHT = torch.tensor([1, 2]), torch.ones(5, 4)


@pytest.mark.parametrize(
    "args, options, problem",
    [
        ((IDS.float(), WEIGHT), {}, "input has dtype float32; allowed: int64, int32"),
        ((IDS, WEIGHT.long()), {}, "weight has dtype int64; allowed: float32"),
        ((IDS, WEIGHT[0]), {}, r"weight has shape \(4,\); expected \(V, D\)"),
        ((IDS, WEIGHT.to("meta")), {}, "weight is on meta but input is on cpu"),
        ((IDS, WEIGHT), {"padding_idx": 5}, "padding_idx is 5; allowed: -5 to 4, or None"),
        ((IDS, WEIGHT), {"padding_idx": -6}, "padding_idx is -6; allowed: -5 to 4, or None"),
        ((IDS, WEIGHT), {"max_norm": 1.0}, "max_norm is not supported; use torch.nn.functional.embedding"),
        ((IDS, WEIGHT), {"scale_grad_by_freq": True}, "scale_grad_by_freq is not supported"),
        ((IDS, WEIGHT), {"sparse": True}, "sparse is not supported"),
        ((IDS, WEIGHT), {"scale": float("nan")}, "scale must be finite, got nan"),
    ],
)
def test_bad_arguments_are_named(args: tuple, options: dict, problem: str):
    with pytest.raises(ValueError, match=f"embedding: {problem}"):
        functional.embedding(*args, **options)


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"embedding: input must be a torch\.Tensor, got list"):
        functional.embedding([1], WEIGHT)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_an_id_that_is_no_row_is_named(wrong: int, backend: str):
    ids = torch.tensor([[0, 4], [wrong, 0]])
    with (
        llmengine.backend(backend),
        pytest.raises(ValueError, match=f"input holds {wrong} at place 2; allowed: 0 to 4"),
    ):
        functional.embedding(ids, WEIGHT)


@pytest.mark.parametrize("target", [t for t in targets() if t.backend != "cpu"], ids=lambda t: t.backend)
@pytest.mark.parametrize("wrong", [5, -1, 2**32 + 3, 3 - 2**32])
def test_where_naming_it_would_mean_waiting_its_result_is_nan_and_no_row_gets_its_gradient(wrong: int, target: Target):
    if target.prepare:
        target.prepare("embedding")
    ids, weight = torch.tensor([0, wrong, 1], device=target.device), WEIGHT.to(target.device).requires_grad_()
    with llmengine.backend(target.backend):
        rows = functional.embedding(ids, weight)
        (gradient,) = torch.autograd.grad(rows, weight, torch.ones_like(rows))
    assert rows.isnan().all(1).tolist() == [False, True, False]
    assert gradient.sum(1).tolist() == [4.0, 4.0, 0.0, 0.0, 0.0]


def test_many_small_gradients_are_not_lost_in_bfloat16():
    """4096 gradients of one id add up to 4096; added up in bfloat16, they would stay at 256."""
    weight = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    rows = functional.embedding(torch.ones(4096, dtype=torch.int64), weight)
    (gradient,) = torch.autograd.grad(rows, weight, torch.ones_like(rows))
    assert gradient[1].tolist() == [4096.0] * 8 and not gradient[::2].any()


def test_threads_do_not_change_a_bit_of_a_large_gradient():
    g = torch.Generator().manual_seed(0)
    ids = (torch.rand(5000, generator=g) ** 4 * 3000).long()
    weight = torch.randn(3000, 130, generator=g).requires_grad_()
    upstream = torch.randn(5000, 130, generator=g)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(torch.autograd.grad(functional.embedding(ids, weight), weight, upstream)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found[1:])
    (expected,) = torch.autograd.grad(torch_functional.embedding(ids, weight), weight, upstream)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_tied_embedding_waits_for_no_number(padding_idx):
    """Of tensors that have shapes alone: what asks how many ids differ, or are no padding, raises."""
    with FakeTensorMode():
        weight = torch.empty(9, 4, requires_grad=True)
        words = functional.TiedEmbedding(weight, padding_idx)
        rows = words(torch.empty(6, dtype=torch.int64))
        (rows @ words.weight.T).sum().backward()
        assert weight.grad.shape == (9, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", ["both", "lookups", "output"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_tied_embedding_gathers_what_autograd_adds(padding_idx, parts, dtype):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(9, 4, generator=g).to(dtype), torch.randn(6, 4, generator=g).to(dtype)
    ids = torch.tensor([[1, 2, 2], [7, 1, 1]])

    def gradient(table, lookup, weight):
        rows = lookup(ids).flatten(0, 1)
        used = x.to(table.dtype) if parts == "output" else rows
        loss = (used @ table.t()).sin().sum() if parts != "lookups" else (rows * x).sum()
        loss = loss + (lookup(ids[0, :2]) ** 2).sum() if parts == "both" else loss  # a second lookup
        return torch.autograd.grad(loss, weight)[0]

    exact = weight.double().requires_grad_()
    expected = gradient(exact, lambda i: torch_functional.embedding(i, exact, padding_idx), exact)
    for _ in range(2):  # nothing of a pass is left for the next one
        leaf = weight.clone().requires_grad_()
        words = functional.TiedEmbedding(leaf, padding_idx)
        found = gradient(words.weight, words, leaf)
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
