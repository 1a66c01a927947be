"""The cases: operators on the shapes that training gives them, each beside PyTorch's way of computing the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.optim import AdamW, gradient_norm
from llmengine.roofline import layers
from llmengine.roofline.case import BOTH, Case, Tensors, named
from llmengine.roofline.choices import attention_kernels
from llmengine.roofline.peers import FLEX, flash_attention, flex, liger
from llmengine.roofline.shapes import SHAPES, Shape

__all__ = ["BOTH", "OPERATORS", "SHAPES", "Case", "Shape", "cases", "cases_of"]


def cases(shapes: str, device: str, dtype: torch.dtype, operators: Collection[str] | None = None) -> Iterator[Case]:
    """The cases of `SHAPES[shapes]`, one after another, those first that matter most should a budget cut them.

    Args:
        operators: names of `OPERATORS`; None takes all.
    """
    for operator, (kind, _) in OPERATORS.items():
        if operators is None or operator in operators:
            for shape in SHAPES[shapes].get(kind, []):
                yield from cases_of(operator, shape, device, dtype)


def cases_of(operator: str, shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """An operator's cases of one shape."""
    return OPERATORS[operator][1](Tensors(device, dtype), shape)


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention(make: Tensors, shape: Shape) -> Iterator[Case]:
    for causal in (False, True):
        yield _attention_case(make, shape, causal)


def _attention_case(make: Tensors, shape: Shape, causal: bool) -> Case:
    batch, heads, tokens, head_dim = shape
    q, k, v = (make.randn(*shape) for _ in range(3))
    backends = torch.nn.attention.SDPBackend

    def sdpa(which: torch.nn.attention.SDPBackend | None = None) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if which is None:
                return torch_functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            with torch.nn.attention.sdpa_kernel(which):
                return torch_functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    peers = {"torch": sdpa()}
    if q.is_cuda:
        peers |= {"torch flash": sdpa(backends.FLASH_ATTENTION), "cudnn": sdpa(backends.CUDNN_ATTENTION)}
        peers[FLEX] = flex(tokens, causal, False, make.device)
    peers |= flash_attention(q, causal)
    flops = 4 * batch * heads * tokens * tokens * head_dim * (0.5 if causal else 1.0)

    def ours(q: Tensor, k: Tensor, v: Tensor, fp8: bool = False) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, fp8=fp8)

    run: dict[str, Callable[..., Tensor]] = {"llmengine": ours}
    run |= attention_kernels(ours, q) | peers
    name = named(shape, "causal" if causal else "full")
    return Case("attention", name, make.dtype, run, [q, k, v], 4 * make.bytes(q), flops, 8 * make.bytes(q), 2.5 * flops)


def _attention_sinks(make: Tensors, shape: Shape) -> Iterator[Case]:
    """Causal; PyTorch's call holds the logits, each row with its head's sink beside them, as Transformers' gpt-oss."""
    batch, heads, tokens, head_dim = shape
    q, k, v, sinks = *(make.randn(*shape) for _ in range(3)), make.randn(heads)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=make.device).triu(1)

    def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        logits = (q @ k.mT * head_dim**-0.5).masked_fill(hidden, -torch.inf)
        column = sinks.view(1, heads, 1, 1).expand(batch, heads, tokens, 1)
        return torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1] @ v

    run: dict[str, Callable[..., Tensor]] = {
        "llmengine": lambda q, k, v, s: functional.scaled_dot_product_attention(q, k, v, is_causal=True, sinks=s),
        "torch": plain,
    }
    if q.is_cuda:
        run[FLEX] = flex(tokens, True, True, make.device)
    flops, size = 2.0 * batch * heads * tokens * tokens * head_dim, make.bytes(q)
    name = named(shape, "causal")
    yield Case("attention_sinks", name, make.dtype, run, [q, k, v, sinks], 4 * size, flops, 8 * size, 2.5 * flops)


def _attention_options(make: Tensors, shape: Shape) -> Iterator[Case]:
    """What else models ask for: to be held beside attention's case of that shape, which has none of it."""
    batch, heads, tokens, head_dim = shape
    shared = max(1, heads // 4)
    q, k, v, bias = *(make.randn(*shape) for _ in range(3)), make.randn(1, heads, tokens, tokens)
    few = [make.randn(batch, shared, tokens, head_dim) for _ in range(2)]
    flops, rows, keys = 2.0 * batch * heads * tokens * tokens * head_dim, make.bytes(q), make.bytes(*few)

    def case(name: str, tensors: list[Tensor], causal: bool, moved: int, back: int, **options: Any) -> Case:
        def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, **options)

        def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return torch_functional.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, **options)

        run: dict[str, Callable[..., Tensor]] = {"llmengine": ours, "torch": plain}
        run |= {peer: call for peer, call in attention_kernels(ours, q).items() if peer.endswith("sm90a")}
        work = flops if causal else 2 * flops
        full = named(shape, name)
        return Case("attention_options", full, make.dtype, run, tensors, moved, work, back, 2.5 * work)

    yield case("causal dropout", [q, k, v], True, 4 * rows, 8 * rows, dropout_p=0.1)
    yield case("learned bias", [q, k, v, bias], False, 4 * rows + make.bytes(bias), 8 * rows + 2 * make.bytes(bias))
    yield case("causal grouped", [q, *few], True, 2 * rows + keys, 4 * rows + 2 * keys, enable_gqa=True)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _layer_norm(make: Tensors, shape: Shape) -> Iterator[Case]:
    x, w, b = make.randn(*shape), make.randn(shape[1]), make.randn(shape[1])
    run = {
        "llmengine": lambda x, w, b: functional.layer_norm(x, shape[1:], w, b),
        "torch": lambda x, w, b: torch_functional.layer_norm(x, shape[1:], w, b),
    }
    if theirs := liger(x):
        run["liger"] = lambda x, w, b: theirs.liger_layer_norm(x, w, b, 1e-5)
    yield Case("layer_norm", named(shape), make.dtype, run, [x, w, b], 2 * make.bytes(x), 0, 3 * make.bytes(x))


def _rms_norm(make: Tensors, shape: Shape) -> Iterator[Case]:
    x, w = make.randn(*shape), make.randn(shape[1])
    run = {
        "llmengine": lambda x, w: functional.rms_norm(x, shape[1:], w),
        "torch": lambda x, w: torch_functional.rms_norm(x, shape[1:], w),
    }
    if theirs := liger(x):  # not in place: the upstream gradient serves every peer
        run["liger"] = lambda x, w: theirs.liger_rms_norm(x, w, 1e-6, in_place=False)
    yield Case("rms_norm", named(shape), make.dtype, run, [x, w], 2 * make.bytes(x), 0, 3 * make.bytes(x))


def _add_layer_norm(make: Tensors, shape: Shape) -> Iterator[Case]:
    x, residual, w, b = make.randn(*shape), make.randn(*shape), make.randn(shape[1]), make.randn(shape[1])
    run = {
        "llmengine": lambda x, r, w, b: functional.add_layer_norm(x, r, shape[1:], w, b)[0],
        "torch": lambda x, r, w, b: torch_functional.layer_norm(x + r, shape[1:], w, b),
    }
    size = make.bytes(x)
    yield Case("add_layer_norm", named(shape), make.dtype, run, [x, residual, w, b], 4 * size, 0, 3 * size)


def _add_rms_norm(make: Tensors, shape: Shape) -> Iterator[Case]:
    x, residual, w = make.randn(*shape), make.randn(*shape), make.randn(shape[1])
    run = {
        "llmengine": lambda x, r, w: functional.add_rms_norm(x, r, shape[1:], w)[0],
        "torch": lambda x, r, w: torch_functional.rms_norm(x + r, shape[1:], w),
    }
    if (theirs := liger(x)) and hasattr(theirs, "liger_fused_add_rms_norm"):  # the newest of its functions
        run["liger"] = lambda x, r, w: theirs.liger_fused_add_rms_norm(x, r, w, 1e-6, in_place=False)[0]
    size = make.bytes(x)
    yield Case("add_rms_norm", named(shape), make.dtype, run, [x, residual, w], 4 * size, 0, 3 * size)


def _softmax(make: Tensors, shape: Shape) -> Iterator[Case]:
    x = make.randn(*shape)
    run = {"llmengine": lambda x: functional.softmax(x, -1), "torch": lambda x: torch.softmax(x, -1)}
    yield Case("softmax", named(shape), make.dtype, run, [x], 2 * make.bytes(x), 0, 3 * make.bytes(x))


def _cross_entropy(make: Tensors, shape: Shape) -> Iterator[Case]:
    x, target = make.randn(*shape), make.classes(shape[1], shape[0])
    for smoothing in (0.0, 0.1):
        name = named(shape, f"smoothing {smoothing}")
        run = {
            "llmengine": lambda x, s=smoothing: functional.cross_entropy(x, target, label_smoothing=s),
            "torch": lambda x, s=smoothing: torch_functional.cross_entropy(x, target, label_smoothing=s),
        }
        if theirs := liger(x):
            # It leaves the gradient in the place of the logits, whoever reads them next: that changes no one's time.
            run["liger"] = lambda x, s=smoothing: theirs.liger_cross_entropy(x, target, label_smoothing=s)
        yield Case("cross_entropy", name, make.dtype, run, [x], make.bytes(x), 0, 2 * make.bytes(x))


def _rotary(make: Tensors, shape: Shape) -> Iterator[Case]:
    tokens, _, head_dim = shape
    x = make.randn(*shape)
    angles = torch.rand(tokens, head_dim // 2, device=make.device)
    cos, sin = angles.cos(), angles.sin()

    def plain(x: Tensor) -> Tensor:
        c, s = cos[:, None], sin[:, None]
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)

    run = {"llmengine": lambda x: functional.rotary_embedding(x, cos, sin), "torch": plain}
    yield Case("rotary", named(shape), make.dtype, run, [x], 2 * make.bytes(x), 0, 2 * make.bytes(x))


def _embedding(make: Tensors, shape: Shape) -> Iterator[Case]:
    """Ids as text has them, by Zipf's law. What is read and written of the tokens, and the table's whole gradient."""
    tokens, rows, width = shape
    weight = make.randn(rows, width)
    ids = torch.multinomial(1 / torch.arange(1.0, rows + 1, device=make.device), tokens, replacement=True)
    run = {
        "llmengine": lambda weight: functional.embedding(ids, weight),
        "torch": lambda weight: torch_functional.embedding(ids, weight),
    }
    size = tokens * width * weight.element_size()
    yield Case("embedding", named(shape), make.dtype, run, [weight], 2 * size, 0, size + make.bytes(weight))


# ---- optimizer -------------------------------------------------------------------------------------------------------


def _adamw(make: Tensors, shape: Shape) -> Iterator[Case]:
    """float32 weights, whatever the dtype of the products; 28 bytes an element, 4 of them the gradient's."""
    if make.device == "cpu" and make.dtype == torch.bfloat16:
        return  # float32 has told it
    count, size = shape
    values, gradients = (torch.randn(count, size, device=make.device) for _ in range(2))

    def step(optimizer: type[torch.optim.Optimizer], **options: Any) -> Callable[[], Tensor]:
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        chosen = optimizer(parameters, **options)

        def call() -> Tensor:
            chosen.step()
            return parameters[0]

        return call

    run = {
        "llmengine": step(AdamW),
        "torch": step(torch.optim.AdamW, fused=True),
        "torch foreach": step(torch.optim.AdamW, foreach=True),
    }
    yield Case("adamw", named(shape), make.dtype, run, [], 28 * count * size, passes=("step",))


def _decode_attention(make: Tensors, shape: Shape) -> Iterator[Case]:
    """A token of each sequence; full caches, so that PyTorch needs no mask."""
    batch, heads, key_heads, tokens, head_dim = shape
    query, key, value = (make.randn(batch, n, m, head_dim) for n, m in ((heads, 1), *[(key_heads, tokens)] * 2))
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=make.device)
    run = {
        "llmengine": lambda q, k, v: functional.decode_attention(q, k, v, lengths),
        "torch": lambda q, k, v: torch_functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads != key_heads),
    }
    tensors, flops = [query, key, value], 4.0 * batch * heads * tokens * head_dim
    name = named(shape)
    yield Case("decode_attention", name, make.dtype, run, tensors, make.bytes(*tensors), flops, passes=("forward",))


def _gradient_norm(make: Tensors, shape: Shape) -> Iterator[Case]:
    gradients = [make.randn(shape[1]) for _ in range(shape[0])]
    run = {
        "llmengine": lambda: gradient_norm(gradients),
        "torch": lambda: torch.nn.utils.get_total_norm(gradients, foreach=True),
    }
    yield Case("gradient_norm", named(shape), make.dtype, run, [], make.bytes(*gradients), passes=("step",))


OPERATORS: dict[str, tuple[str, Callable[[Tensors, Shape], Iterator[Case]]]] = {
    "attention": ("attention", _attention),
    "ffn": ("ffn", layers.ffn),
    "linear": ("linear", layers.linear),
    "linear_cross_entropy": ("linear_cross_entropy", layers.linear_cross_entropy),
    "gated_ffn": ("gated_ffn", layers.gated_ffn),
    "layer_norm": ("rows", _layer_norm),
    "rms_norm": ("rows", _rms_norm),
    "add_layer_norm": ("rows", _add_layer_norm),
    "add_rms_norm": ("rows", _add_rms_norm),
    "softmax": ("rows", _softmax),
    "cross_entropy": ("logits", _cross_entropy),
    "decode_attention": ("cache", _decode_attention),
    "rotary": ("rotary", _rotary),
    "embedding": ("embedding", _embedding),
    "adamw": ("parameters", _adamw),
    "gradient_norm": ("parameters", _gradient_norm),
    "linear_cross_entropy_options": ("head_options", layers.head_options),
    "attention_options": ("options", _attention_options),  # last: of these a budget may leave some out
    "attention_sinks": ("sinks", _attention_sinks),
}
