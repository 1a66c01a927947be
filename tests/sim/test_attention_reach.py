"""How far CUDA attention's kernels reach: every head dim, rows that lie beyond 32 bits, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends.cuda.attention import one_pass_refuses
from llmengine.backends.cuda.native import ATTENTION
from llmengine.testing import LAYOUTS

from .harness import places, schedule
from .test_attention import BY_SM80, HALVES, HEAVY, SDPA, assert_right, sample_of


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)


DIMS = range(32, 257, 8)


@pytest.mark.parametrize("dim", [pytest.param(d, marks=() if d % 56 == 32 else HEAVY) for d in DIMS])
@pytest.mark.parametrize("backend", places(), ids=BY_SM80)
def test_every_head_dim(dim: int, backend: str):
    sample = sample_of("plain", 33, 70, dim, 2, 1, causal="bottom_right", return_lse=True)
    assert_right(SDPA, sample, HALVES[dim // 8 % 2], backend=backend)
    mask = torch.randn(33, 70, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    assert_right(SDPA, sample_of("mask", 33, 70, dim, attn_mask=mask), HALVES[dim // 8 % 2 - 1], backend=backend)


# ---- rows beyond 32 bits ---------------------------------------------------------------------------------------------


def far(x: Tensor, dim: int) -> Tensor:
    """Steps along the dimension lead beyond 2^31 elements, to multiples of 16 bytes."""
    swapped = LAYOUTS["huge stride"](x.transpose(0, dim).contiguous())
    assert swapped.stride(0) * (x.shape[dim] - 1) > 2**31 and swapped.stride(0) % 8 == 0
    return swapped.transpose(0, dim)


@pytest.mark.parametrize("kernels", ["sm80", "sm90a"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_that_lie_beyond_32_bits(dim: int, kernels: str, monkeypatch):
    """Of batch entries, heads and tokens, of query, key, value, a mask and the outputs' gradients one after another."""
    monkeypatch.setenv(ATTENTION, kernels)
    g = torch.Generator().manual_seed(0)
    near = [torch.randn(5, 5, 5, n, generator=g).bfloat16() for n in (8, 8, 8, 5, 8)]

    def run(query, key, value, mask, upstream):
        leaves = [t.detach().requires_grad_() for t in (query, key, value, mask)]
        with llmengine.backend("cuda_sim"):
            y = functional.scaled_dot_product_attention(*leaves[:3], leaves[3])
            return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    expected = run(*near)
    for i in range(len(near)):
        found = run(*near[:i], far(near[i], dim), *near[i + 1 :])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), i


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_grid_of_more_rows_than_integers_number_is_refused():
    query = torch.empty(1, 512, 2**22 - 64, 64, device="meta")
    assert one_pass_refuses(query, query, None) is None
    ends = torch.tensor([0, 2**22 - 64])  # packed sequences have a tile more
    assert "less than 2^31 rows of all heads, in tiles of 64, got 2147483648" in one_pass_refuses(query, query, ends)


def test_gpus_that_are_too_old_are_named():
    from llmengine import _cuda_sim

    assert _cuda_sim.problem_of_capability(80) == _cuda_sim.problem_of_capability(120) == ""
    assert _cuda_sim.problem_of_capability(75) == "the GPU has compute capability 7.5; allowed: 8.0 and above"
