"""The linear layer: which products run where, and what it refuses. Its laws are those of tests/test_ops.py."""

from __future__ import annotations

import contextlib

import pytest
import torch

import llmengine
from llmengine import functional
from llmengine.nn import fusing


def tensors(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((rows, 40), (24, 40), (24,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the operators that run."""
    names: list[str] = []
    dispatch = llmengine.ops.registry.dispatch
    monkeypatch.setattr(
        llmengine.ops.registry, "dispatch", lambda name, args: names.append(name) or dispatch(name, args)
    )
    return names


@pytest.mark.parametrize(
    "rows, dtype",
    [(63, torch.bfloat16), (64, torch.bfloat16), (1023, torch.bfloat16), (1024, torch.float32), (1024, torch.bfloat16)],
)
def test_our_products_run_where_they_are_quicker(rows, dtype, ran):
    x, weight, bias = tensors(rows, dtype)
    result = functional.linear(x, weight, bias)
    fewest = {"amx": 1024, "avx512_rounding": 64}.get(llmengine.ops.registry.report()["cpu_isa"], 10**9)
    ours = rows >= fewest and dtype == torch.bfloat16
    assert ran == (["linear_forward"] if ours else [])
    torch.testing.assert_close(result, torch.nn.functional.linear(x, weight, bias))


def test_and_where_a_backend_is_demanded(ran):
    with llmengine.backend("cpu"):
        functional.linear(*tensors(3, torch.float32))
    assert ran == ["linear_forward"]


def test_so_are_leaves_by_a_backend_that_has_them(ran, monkeypatch):
    monkeypatch.setattr(fusing, "FROM_ROWS", None)
    leaf, x = torch.nn.Linear(40, 24), tensors(3, torch.float32)[0]
    fusing.linear(leaf, x)
    assert ran == []
    for backend in ("cpu", "reference"):
        with llmengine.backend(backend):
            fusing.linear(leaf, x)
    assert ran == ["linear_forward"] * 2
    monkeypatch.setattr(fusing, "FROM_ROWS", 64)
    with llmengine.backend("triton"):  # which leaves them to PyTorch
        fusing.linear(leaf, x)
    assert ran == ["linear_forward"] * 2


def test_explain_names_pytorchs(monkeypatch):
    monkeypatch.setattr(fusing, "FROM_ROWS", None)
    x, weight, bias = tensors(3, torch.float32)
    why = " (ours run where they were measured to be quicker, or are asked for)"
    assert llmengine.explain("linear", x, weight, bias) == "linear: PyTorch's linear" + why
    leaf = torch.nn.Linear(40, 24)
    assert llmengine.explain(fusing.linear, leaf, x) == "linear: PyTorch's linear" + why
    adapter = type("Adapter", (torch.nn.Linear,), {})(40, 24)
    assert llmengine.explain(fusing.linear, adapter, x) == "linear: a Adapter" + why
    with llmengine.backend("cpu"):
        assert llmengine.explain("linear", x, weight, bias) == "linear_forward: cpu"
        assert llmengine.explain(fusing.linear, leaf, x) == "linear_forward: cpu"
    compiled = torch.compile(lambda: functional.linear(x, weight), backend="eager", fullgraph=True)
    assert llmengine.explain(compiled) == ""


@pytest.mark.parametrize("demand", [True, False])
def test_autocast_casts_the_input_and_gradients_come_back_in_float32(demand):
    x, weight, bias = (t.requires_grad_() for t in tensors(7, torch.float32))
    with llmengine.backend("cpu") if demand else contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16):
        result = functional.linear(x, weight, bias)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert [t.grad.dtype for t in (x, weight, bias)] == [torch.float32] * 3


@pytest.mark.parametrize("watched", [True, False])
def test_a_leaf_that_somebody_watches_is_called(watched, monkeypatch):
    monkeypatch.setattr(fusing, "FROM_ROWS", 64)
    leaf, seen = torch.nn.Linear(40, 24), []
    if watched:
        leaf.register_forward_hook(lambda *_: seen.append(True))
    x = tensors(3, torch.float32)[0]
    torch.testing.assert_close(fusing.linear(leaf, x), torch.nn.functional.linear(x, leaf.weight, leaf.bias))
    assert bool(seen) == watched


@pytest.mark.parametrize("preset", ["gpt2", "xlnet-base", "bart-base"])
def test_the_projections_of_models_come_here(preset, monkeypatch):
    """All but XLNet's of distances: two of self-attention (three of XLNet's), three of cross-attention."""
    sizes = {"n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 48, "vocab_size": 60}
    called: list[str] = []
    monkeypatch.setattr(fusing, "FROM_ROWS", 64)
    monkeypatch.setattr(functional, "linear", lambda *args: called.append("") or torch.nn.functional.linear(*args))
    config = llmengine.TransformerConfig.preset(preset).replace(
        **sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2 if preset[0] == "b" else None
    )
    ids = torch.arange(3, 15).view(2, 6)
    llmengine.Transformer(config).eval()(ids, labels=ids)
    assert len(called) == {"gpt2": 2, "xlnet-base": 3, "bart-base": 7}[preset]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.ones(6, 5)}, r"weight has shape \(6, 5\); expected \(6, 4\)"),
        ({"weight": torch.ones(6)}, r"weight has shape \(6,\); expected \(out, 4\)"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\); expected \(6,\)"),
        ({"input": torch.ones(())}, r"input has shape \(\); expected \(\*, in\)"),
        ({"input": torch.ones(3, 4, dtype=torch.int64)}, "input has dtype int64; allowed: float32"),
        ({"weight": torch.ones(6, 4, dtype=torch.bfloat16)}, "weight has dtype bfloat16; allowed: that of input"),
        ({"weight": torch.ones(6, 4, device="meta")}, "weight is on meta but input is on cpu"),
    ],
)
def test_errors_name_argument_given_and_allowed(change, message):
    arguments = {"input": torch.ones(3, 4), "weight": torch.ones(6, 4), "bias": torch.ones(6)} | change
    with pytest.raises(ValueError, match=f"^linear: {message}"):
        functional.linear(**arguments)


@pytest.mark.parametrize("depth", [300, 768, 2100])
def test_long_sums_err_as_pytorchs(depth):
    """Sums go in chains as long as PyTorch's where there are many rows (csrc/cpu/kernels/gemm.cpp)."""
    g = torch.Generator().manual_seed(depth)
    x, weight = torch.rand(96, depth, generator=g), torch.rand(100, depth, generator=g)
    exact = x.double() @ weight.double().T
    with llmengine.backend("cpu"):
        ours = functional.linear(x, weight)
    errors = [(y - exact).square().mean().sqrt() for y in (ours, torch.nn.functional.linear(x, weight))]
    assert 0 < errors[0] <= 1.5 * errors[1]
