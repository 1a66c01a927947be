"""The gradient filter of linear cross-entropy: what it may leave out, what Triton leaves out, and that no more is."""

from __future__ import annotations

import pytest
import torch

import llmengine
from llmengine import functional
from llmengine.backends.triton import block_sparse, linear_cross_entropy, tiles
from llmengine.backends.triton.block_sparse import Kept, block_sparse_gemm
from llmengine.ops import linear_cross_entropy as ops
from llmengine.testing import poison, targets

TRITON = [t for t in targets() if t.backend == "triton"]
FILTER = 2**-6
TOKENS, WIDTH, CLASSES = 150, 64, 700  # two tiles of the interpreter's and a piece; five and a piece


@pytest.fixture(autouse=True)
def a_backward_of_its_own(monkeypatch):
    """As on GPUs, though the interpreter's tensors lie on the CPU."""
    monkeypatch.setattr(ops, "at_once", lambda *_: False)


def operands(certain: float):
    """Tokens whose labels are among their tile's: far from them, tiles are as improbable as the tokens are certain."""
    g = torch.Generator().manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(CLASSES, WIDTH, generator=g)) * WIDTH**0.5
    target = torch.arange(TOKENS) // 64 * 256 + torch.randint(128, (TOKENS,), generator=g)
    x = certain * w[target] / WIDTH + 0.1 * torch.randn(TOKENS, WIDTH, generator=g)
    target[::7] = -100
    return x, w, target


def gradients(x, w, target, backend, **options):
    x, w, bias = (t.clone().requires_grad_() for t in (x, w, torch.zeros(CLASSES, device=w.device)))
    with llmengine.backend(backend), poison():
        loss = functional.linear_cross_entropy(x, w, target, linear_bias=bias, **options)
        return torch.autograd.grad(loss.sum(), (x, w, bias))


def logits_gradient(x, w, target, reduction, label_smoothing=0.0):
    """In float64; also what of it the unreduced losses give, by which tiles are judged."""
    logits = (x.double() @ w.double().T).requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    (each,) = torch.autograd.grad(losses.sum(), logits)
    return (each / (target != -100).sum() if reduction == "mean" else each), each


@pytest.fixture
def products(monkeypatch):
    """How many k-steps the block-sparse products made, and how many there were."""
    made = []

    class Watched:
        def __getitem__(self, grid):
            def launch(a, b, steps, counts, *args, **options):
                made.append((int(counts.sum()), steps.numel()))
                return product[grid](a, b, steps, counts, *args, **options)

            return launch

    product = block_sparse._product
    monkeypatch.setattr(block_sparse, "_product", Watched())
    return made


@pytest.mark.parametrize("target", TRITON, ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("chunk", [1 << 25, 1], ids=["one chunk", "chunks"])
def test_tiles_below_the_filter_are_left_out_and_no_others(target, options, chunk, products, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", chunk)
    monkeypatch.setattr(linear_cross_entropy, "LEAST", 256)
    x, w, labels = (t.to(target.device) for t in operands(12.0))
    ours = gradients(x, w, labels, "triton", gradient_filter=FILTER, **options)
    tile = tiles.pick("fused", x, w.T)
    dz, each = logits_gradient(x, w, labels, **({"reduction": "mean"} | options))
    left = torch.zeros_like(dz, dtype=torch.bool)
    for i in range(0, TOKENS, tile.m):
        for j in range(0, CLASSES, tile.n):
            left[i : i + tile.m, j : j + tile.n] = (each[i : i + tile.m, j : j + tile.n].abs() <= FILTER).all()
    assert 0.2 < left.double().mean() < 0.9
    dz = dz.masked_fill(left, 0.0)
    for a, b in zip(ours, (dz @ w.double(), dz.T @ x.double(), dz.sum(0)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    made, all_of_them = map(sum, zip(*products, strict=True))
    assert 0 < made < 0.8 * all_of_them


@pytest.mark.parametrize("target", TRITON, ids=str)
def test_the_error_is_what_the_filter_allows(target):
    """Of float16 too, and of every gradient: the sum of what its tiles may at most have held."""
    for dtype in target.dtypes:
        x, w, labels = (t.to(target.device) for t in operands(9.0))
        x, w = x.to(dtype), w.to(dtype)
        ours = gradients(x, w, labels, "triton", gradient_filter=FILTER)
        exact = gradients(x, w, labels, "triton")
        share = FILTER / int((labels != -100).sum())
        labelled = (labels != -100).double()[:, None]
        bounds = (
            share * labelled * w.double().abs().sum(0),
            share * (labelled * x.double().abs()).sum(0).expand(CLASSES, -1),
            share * labelled.sum().expand(CLASSES),
        )
        assert any((a != b).any() for a, b in zip(ours, exact, strict=True))
        for a, b, bound in zip(ours, exact, bounds, strict=True):
            rounding = 4 * torch.finfo(dtype).eps * b.abs().max()
            assert ((a - b).double().abs() <= bound + rounding).all()


@pytest.mark.parametrize("target", TRITON, ids=str)
def test_without_a_filter_nothing_is_left_out(target, products):
    x, w, labels = (t.to(target.device) for t in operands(12.0))
    gradients(x, w, labels, "triton")
    assert not products


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_other_backends_leave_out_nothing(backend):
    given = operands(12.0)
    for a, b in zip(
        gradients(*given, backend, gradient_filter=FILTER, softcap=30.0), gradients(*given, backend, softcap=30.0),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("target", TRITON, ids=str)
@pytest.mark.parametrize("scale", [torch.inf, torch.nan])
def test_an_overflow_is_not_filtered(target, scale):
    """As a scaled loss's may: whoever looks for it must find it, in every row."""
    x, w, labels = (t.to(target.device) for t in operands(12.0))
    x, w = x.requires_grad_(), w.requires_grad_()
    with llmengine.backend("triton"):
        loss = functional.linear_cross_entropy(x, w, labels, gradient_filter=FILTER)
        of_x, of_w = torch.autograd.grad(loss * scale, (x, w))
    assert not of_x[labels != -100].isfinite().any() and not of_w.isfinite().any()


@pytest.mark.parametrize("value", [-1e-3, 1.0, torch.nan])
def test_a_filter_that_is_none(value):
    with pytest.raises(ValueError, match=r"linear_cross_entropy: gradient_filter must lie in \[0, 1\), got"):
        functional.linear_cross_entropy(*operands(1.0), gradient_filter=value)


# ---- the products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TRITON, ids=str)
@pytest.mark.parametrize("m, n, kept", [(16, 16, 0.1), (64, 32, 0.0), (64, 32, 1.0), (128, 256, 0.4)], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_products_of_tiles_of_any_size(target, m, n, kept, turned):
    """What is not kept holds NaN: it enters nothing."""
    g = torch.Generator().manual_seed(1)
    rows, columns = 333, 290
    flags = (torch.rand(-(-rows // m), -(-columns // n), generator=g) < kept).int()
    dense = flags.repeat_interleave(m, 0)[:rows].repeat_interleave(n, 1)[:, :columns].bool()
    a = torch.randn(rows, columns, generator=g)
    exact = torch.where(dense, a, 0.0).double()
    a = torch.where(_within_a_step(dense), torch.where(dense, a, 0.0), torch.nan)
    tiled, exact = Kept(flags.to(target.device), m, n), exact.to(target.device)
    a = a.to(target.device)
    if turned:
        a, tiled, exact = a.T, tiled.T, exact.T
    b = torch.randn(a.shape[1], 40, generator=g).to(target.device)
    out = torch.full((a.shape[0], 40), torch.nan, device=target.device)
    block_sparse_gemm(a, tiled, b, out=out)
    torch.testing.assert_close(out.double(), exact @ b.double(), rtol=1e-5, atol=1e-4)
    block_sparse_gemm(a, tiled, b, out=out, added=True)
    torch.testing.assert_close(out.double(), 2 * exact @ b.double(), rtol=1e-5, atol=1e-4)


def _within_a_step(dense):
    """What shares a block of the products' tiles, of at most 256 x 256, with something that is kept."""
    blocks = torch.nn.functional.max_pool2d(dense[None].float(), 256, ceil_mode=True)
    return blocks.repeat_interleave(256, 1).repeat_interleave(256, 2)[0, : dense.shape[0], : dense.shape[1]] > 0
