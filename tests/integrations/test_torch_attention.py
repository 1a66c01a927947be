"""llmengine as an implementation of PyTorch's flash attention. Without a GPU the operators of ATen are tried under the
CPU's dispatch key, where PyTorch has no kernels for them: dispatcher, schemas and derivatives are PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine.functional import scaled_dot_product_attention, varlen_attention
from llmengine.integrations import torch_attention
from llmengine.ops import registry

aten = torch.ops.aten
SDPA = "aten::_scaled_dot_product_flash_attention"
NAMED = hasattr(torch.nn.attention, "register_flash_attention_impl")


@pytest.fixture
def overridden():
    overrides = registry.override(torch_attention.KERNELS, "CPU")
    yield
    overrides.remove()


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


def assert_equal(ours: tuple, expected: tuple) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not NAMED, reason="this PyTorch has no names for implementations of flash attention")
def test_it_is_activated_by_its_name_and_restored(monkeypatch):
    assert torch_attention.register()
    assert "llmengine" in torch.nn.attention.list_flash_attention_impls()
    on_gpus = torch._C._dispatch_has_kernel_for_dispatch_key
    before = on_gpus(SDPA, "CUDA")
    monkeypatch.setattr(registry, "load", lambda name: registry.Backend(name))  # as where there is a GPU
    for _ in range(2):
        torch.nn.attention.activate_flash_attention_impl("llmengine")
        assert torch.nn.attention.current_flash_attention_impl() == "llmengine"
        assert all(on_gpus(f"aten::{name}", "CUDA") for name in torch_attention.KERNELS if hasattr(aten, name))
        torch.nn.attention.restore_flash_attention_impl()
        assert torch.nn.attention.current_flash_attention_impl() is None and on_gpus(SDPA, "CUDA") == before


@pytest.mark.skipif(not NAMED, reason="this PyTorch has no names for implementations of flash attention")
def test_it_is_not_activated_where_nothing_could_run(monkeypatch):
    torch_attention.register()
    monkeypatch.setattr(registry, "load", lambda name: registry.Backend(name, unavailable="no driver"))
    with pytest.raises(RuntimeError, match=r"no kernels for GPUs here \(cuda: no driver; triton: no driver\)"):
        torch.nn.attention.activate_flash_attention_impl("llmengine")
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_an_older_pytorch_has_no_names(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    assert torch_attention.register() is False


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("keys", [9, 14])
def test_scaled_dot_product_attention_with_pytorchs_derivative(overridden, is_causal, heads_first, dropout_p, keys):
    given = tensors((2, 4, 9, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    if not heads_first:
        given = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given]
    upstream = torch.randn(2, 4, 9, 8)
    torch.manual_seed(7)
    output, lse, *_ = aten._scaled_dot_product_flash_attention(*given, dropout_p, is_causal, scale=0.3)
    torch.manual_seed(7)
    expected, expected_lse = scaled_dot_product_attention(
        *given,
        dropout_p=dropout_p,
        causal="bottom_right" if is_causal else None,
        scale=0.3,
        enable_gqa=True,
        return_lse=True,
    )
    assert_equal((output, lse), (expected, expected_lse))
    assert output.stride() == torch.empty_like(given[0]).stride()
    assert_equal(*(torch.autograd.grad(y, given, upstream) for y in (output, expected)))


@pytest.mark.parametrize("window", [(None, None), (3, -1)])
def test_flash_attention_of_padded_batches(overridden, window):
    given = tensors((2, 5, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    sides = {"window_size_left": window[0], "window_size_right": window[1]}
    output, lse, *state, _ = aten._flash_attention_forward(*given, None, None, 5, 9, 0.0, True, False, **sides)
    heads_first = [x.transpose(1, 2) for x in given]
    expected, expected_lse = scaled_dot_product_attention(
        *heads_first, causal="bottom_right", window_size=[-1 if w is None else w for w in window], enable_gqa=True,
        return_lse=True,
    )  # fmt: skip
    assert_equal((output, lse), (expected.transpose(1, 2), expected_lse))
    upstream = torch.randn(output.shape)
    ours = aten._flash_attention_backward(
        upstream, *given, output, lse, None, None, 5, 9, 0.0, True, *state, **sides
    )  # fmt: skip
    assert_equal(ours, torch.autograd.grad(expected, given, upstream.transpose(1, 2)))


def test_flash_attention_of_packed_sequences(overridden):
    given = tensors((9, 4, 8), (12, 2, 8), (12, 2, 8))
    cuts = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 4, 9], [0, 7, 12])]
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    output, lse, *_ = aten._flash_attention_forward(*given, *cuts, 5, 7, 0.0, True, False, alibi_slopes=slopes)
    assert_equal(
        (output, lse), varlen_attention(*given, *cuts, 5, 7, is_causal=True, alibi_slopes=slopes, return_lse=True)
    )
    output, lse, *state, _ = aten._flash_attention_forward(*given, *cuts, 5, 7, 0.0, False, False)
    upstream = torch.randn(output.shape)
    ours = aten._flash_attention_backward(upstream, *given, output, lse, *cuts, 5, 7, 0.0, False, *state)
    expected = varlen_attention(*given, *cuts, 5, 7)
    assert_equal(ours, torch.autograd.grad(expected, given, upstream))


@pytest.mark.skipif(not hasattr(aten, "_flash_attention_forward_no_dropout_inplace"), reason="not in this PyTorch")
def test_flash_attention_into_a_given_tensor(overridden):
    given = [x.detach() for x in tensors((9, 4, 8), (9, 4, 8), (9, 4, 8))]
    cuts = [torch.tensor([0, 4, 9], dtype=torch.int32)] * 2
    out = torch.full((9, 4, 8), torch.nan)
    lse = aten._flash_attention_forward_no_dropout_inplace(out, *given, *cuts, 5, 5, 0.0, True, False)
    assert_equal((out, lse), varlen_attention(*given, *cuts, 5, 5, is_causal=True, return_lse=True))


def test_what_it_does_not_take_is_named(overridden):
    given = [x.detach() for x in tensors((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8))]
    with pytest.raises(
        RuntimeError, match="_flash_attention_forward: llmengine's implementation does not take seqused"
    ):
        aten._flash_attention_forward(
            *given, None, None, 5, 5, 0.0, True, False, seqused_k=torch.tensor([5, 5], dtype=torch.int32)
        )
    with pytest.raises(RuntimeError, match="does not take return_debug_mask"):
        aten._scaled_dot_product_flash_attention(*given, 0.0, False, True)


def test_in_bfloat16_on_the_kernels_for_gpus(overridden):
    """In the simulator, forward and backward."""
    from llmengine.testing import simulator

    simulator.ready()
    given = [x.detach().bfloat16().requires_grad_() for x in tensors((1, 2, 20, 16), (1, 1, 20, 16), (1, 1, 20, 16))]
    with llmengine.backend("cuda_sim"):
        output = aten._scaled_dot_product_flash_attention(*given, 0.0, True)[0]
        found = torch.autograd.grad(output.sum(), given)
        expected = scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
        gradients = torch.autograd.grad(expected.sum(), given)
    assert torch.equal(output, expected)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
