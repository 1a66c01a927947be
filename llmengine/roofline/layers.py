"""Cases of layers, which are made of products of matrices: linear, feed-forward and a head with its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.functional.linear import products
from llmengine.roofline.case import Case, Shape, Tensors, named
from llmengine.roofline.choices import by_own_products, gradients_at_once, in_8_bits
from llmengine.roofline.peers import cut_cross_entropy, liger, torch_linear_cross_entropy

GELU = "gelu_tanh"


def ffn(make: Tensors, shape: Shape) -> Iterator[Case]:
    tokens, d_model, d_ff = shape
    x, b_up, b_down = make.randn(tokens, d_model), make.randn(d_ff), make.randn(d_model)
    up, down = make.randn(d_ff, d_model, scale=d_model**-0.5), make.randn(d_model, d_ff, scale=d_ff**-0.5)
    flops = 4.0 * tokens * d_model * d_ff
    moved = make.bytes(x, x, up, down)

    def ours(x: Tensor, up: Tensor, b_up: Tensor, down: Tensor, b_down: Tensor) -> Tensor:
        return functional.ffn(x, up, down, b_up=b_up, b_down=b_down, activation=GELU)

    def plain(x: Tensor, up: Tensor, b_up: Tensor, down: Tensor, b_down: Tensor) -> Tensor:
        hidden = torch_functional.gelu(torch_functional.linear(x, up, b_up), approximate="tanh")
        return torch_functional.linear(hidden, down, b_down)

    run: dict[str, Callable[..., Tensor]] = {"llmengine": ours, "torch": plain, **by_own_products(ours, x)}
    yield Case("ffn", named(shape), make.dtype, run, [x, up, b_up, down, b_down], moved, flops, 2 * moved, 2 * flops)


def gated_ffn(make: Tensors, shape: Shape) -> Iterator[Case]:
    """By silu, without biases: SwiGLU, as Llama's."""
    tokens, d_model, d_ff = shape
    x, down = make.randn(tokens, d_model), make.randn(d_model, d_ff, scale=d_ff**-0.5)
    up, gate = (make.randn(d_ff, d_model, scale=d_model**-0.5) for _ in range(2))
    flops, moved = 6.0 * tokens * d_model * d_ff, make.bytes(x, x, up, gate, down)

    def ours(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
        return functional.ffn(x, up, down, w_gate=gate, activation="silu")

    def plain(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
        hidden = torch_functional.silu(torch_functional.linear(x, gate)) * torch_functional.linear(x, up)
        return torch_functional.linear(hidden, down)

    run: dict[str, Callable[..., Tensor]] = {"llmengine": ours, "torch": plain, **by_own_products(ours, x)}
    if theirs := liger(x):
        product = torch_functional.linear
        run["liger"] = lambda x, up, gate, down: product(theirs.liger_swiglu(product(x, gate), product(x, up)), down)
    yield Case("gated_ffn", named(shape), make.dtype, run, [x, up, gate, down], moved, flops, 2 * moved, 2 * flops)


def linear(make: Tensors, shape: Shape) -> Iterator[Case]:
    tokens, width, out = shape
    x, weight, bias = make.randn(tokens, width), make.randn(out, width, scale=width**-0.5), make.randn(out)
    flops, moved = 2.0 * tokens * width * out, make.bytes(x, weight, bias) + tokens * out * x.element_size()
    run = {"llmengine": products, "torch": torch_functional.linear, **by_own_products(products, x)}
    run |= in_8_bits(x)
    yield Case("linear", named(shape), make.dtype, run, [x, weight, bias], moved, flops, 2 * moved, 2 * flops)


def linear_cross_entropy(make: Tensors, shape: Shape) -> Iterator[Case]:
    tokens, d_model, classes = shape
    x, w = make.randn(tokens, d_model), make.randn(classes, d_model, scale=d_model**-0.5)
    target = make.classes(classes, tokens)
    flops = 2.0 * tokens * d_model * classes
    moved = make.bytes(x, w)

    def ours(x: Tensor, w: Tensor, recompute: bool = True) -> Tensor:
        return functional.linear_cross_entropy(x, w, target, recompute=recompute)

    run = {
        "llmengine": ours,
        "torch": lambda x, w: torch_functional.cross_entropy(torch_functional.linear(x, w), target),
        **by_own_products(ours, x),
        **gradients_at_once(ours, x, w),
    }
    if theirs := liger(x):
        run["liger"] = lambda x, w: theirs.liger_fused_linear_cross_entropy(x, w, target)
    if cut := cut_cross_entropy(x):
        run["cut-cross-entropy"] = lambda x, w: cut(x, w, target)
    if chunked := torch_linear_cross_entropy(x):
        run["torch in chunks"] = lambda x, w: chunked(x, w, target)
    yield Case("linear_cross_entropy", named(shape), make.dtype, run, [x, w], moved, flops, 2 * moved, 2 * flops)


def head_options(make: Tensors, shape: Shape) -> Iterator[Case]:
    """Linear cross-entropy with every option at once, beside those that have them all."""
    tokens, d_model, classes = shape
    x, w = make.randn(tokens, d_model), make.randn(classes, d_model, scale=d_model**-0.5)
    b, weight, target = make.randn(classes), make.randn(classes).float().abs(), make.classes(classes, tokens)
    smoothing, z_loss, softcap = 0.1, 1e-4, 30.0
    flops, moved = 2.0 * tokens * d_model * classes, make.bytes(x, w, b)

    def ours(x: Tensor, w: Tensor, b: Tensor, recompute: bool = True) -> Tensor:
        return functional.linear_cross_entropy(
            x, w, target, linear_bias=b, weight=weight, label_smoothing=smoothing, z_loss=z_loss, softcap=softcap,
            recompute=recompute,
        )  # fmt: skip

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logits = softcap * torch.tanh(torch_functional.linear(x, w, b).float() / softcap)
        loss = torch_functional.cross_entropy(logits, target, weight, label_smoothing=smoothing)
        return loss + z_loss * logits.logsumexp(-1).square().sum() / weight[target].sum()

    run: dict[str, Callable[..., Tensor]] = {"llmengine": ours, "torch": plain, **by_own_products(ours, x)}
    run |= gradients_at_once(ours, x, w)
    if theirs := liger(x):
        options = {"label_smoothing": smoothing, "lse_square_scale": z_loss, "softcap": softcap, "ce_weight": weight}
        run["liger"] = lambda x, w, b: theirs.liger_fused_linear_cross_entropy(x, w, target, b, **options)
    operator, name = "linear_cross_entropy_options", named(shape, "all")
    yield Case(operator, name, make.dtype, run, [x, w, b], moved, flops, 2 * moved, 2 * flops)
