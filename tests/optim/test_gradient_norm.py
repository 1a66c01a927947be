"""The gradients' norm beside torch.nn.utils.get_total_norm; its laws are in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from llmengine.optim import gradient_norm


def randn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def test_none_and_empty_ones_have_no_length():
    assert gradient_norm([]) == gradient_norm(iter([torch.ones(0), torch.ones(2, 0)])) == 0


@pytest.mark.filterwarnings("ignore:llmengine. gradient_norm on cpu runs on the slow reference:UserWarning")
def test_dtypes_may_be_mixed():
    given = randn((40, 3), (7,)) + randn((300,), dtype=torch.bfloat16)
    found = gradient_norm(given)
    assert found.dtype == torch.float32 and found.shape == ()
    exact = torch.cat([g.double().flatten() for g in given]).norm()
    torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=0)
    assert gradient_norm([*given, torch.ones(2).double()]).dtype == torch.float64


def test_strided_gradients_count_as_contiguous_ones():
    (wide,) = randn((30, 40))
    assert torch.equal(gradient_norm([wide.t(), wide[:, ::2]]), gradient_norm([wide.t().clone(), wide[:, ::2].clone()]))


def test_squares_that_no_float32_holds():
    assert gradient_norm([torch.tensor([3e30, -4e30])]) == torch.tensor(5e30)
    assert gradient_norm([torch.full((4,), 1e-30)]) == torch.tensor(2e-30)


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16():
    given = randn((1000,), (3000,), dtype=torch.bfloat16)
    exact = torch.nn.utils.get_total_norm([g.double() for g in given])
    assert abs(gradient_norm(given) / exact - 1) < 1e-7


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_does_what_it_does_in_pytorch(poison: float):
    given = [*randn((50,)), torch.tensor([1.0, poison])]
    torch.testing.assert_close(gradient_norm(given), torch.nn.utils.get_total_norm(given), equal_nan=True)


def test_threads_do_not_change_a_bit():
    given, found, threads = randn((300_001,), (70_000,), (5,)), [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(gradient_norm(given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(norm, found[0]) for norm in found)


def test_other_gradients_are_named():
    with pytest.raises(ValueError, match=r"gradients has a torch\.sparse_coo tensor of torch\.float32"):
        gradient_norm([torch.eye(3).to_sparse()])
    with pytest.raises(ValueError, match=r"gradients has a torch\.strided tensor of torch\.int64"):
        gradient_norm([torch.ones(3, dtype=torch.int64)])
