"""Kernels of the CUDA backend that are timed beside those it takes by itself, where they take the call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmengine import functional
from llmengine.backends.cuda import nvrtc
from llmengine.backends.cuda.attention import WIDEST_IN_ONE_PASS
from llmengine.backends.cuda.native import (
    BUILT_AHEAD,
    HOPPER,
    attention_backward_by,
    attention_by,
    exact_kernels,
    products_by,
)
from llmengine.backends.fp8 import SCALINGS
from llmengine.ops.linear_cross_entropy import block_tokens
from llmengine.ops.registry import backend
from llmengine.roofline.peers import scaled_linear


@dataclass(frozen=True)
class Within:
    """A function and what it is called within, forward and backward."""

    function: Callable[..., Tensor]
    context: Callable[[], contextlib.AbstractContextManager]
    has_gradient: bool = True

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def on_cuda(
    choose: Callable[[], contextlib.AbstractContextManager],
) -> Callable[[], contextlib.AbstractContextManager]:
    """The CUDA backend, with a choice between its kernels."""

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        with choose(), backend("cuda"):
            yield

    return within


@contextlib.contextmanager
def in_one_pass() -> Iterator[None]:
    with attention_by("sm90a"), attention_backward_by("one_pass"):
        yield


def attention_kernels(ours: Callable[..., Tensor], q: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Hopper's, backward in one pass too, and forward in 8 bits, rounding among what is timed; and those of exactly
    this head dim, which are compiled here."""
    run: dict[str, Callable[..., Tensor]] = {}
    if not q.is_cuda or q.dtype == torch.float32:
        return run
    head_dim = q.shape[-1]
    if torch.cuda.get_device_capability(q.device) == HOPPER:
        run["llmengine cuda sm90a"] = Within(ours, on_cuda(lambda: attention_by("sm90a")))
        if head_dim <= WIDEST_IN_ONE_PASS:
            run["llmengine cuda one pass"] = Within(ours, on_cuda(in_one_pass))
        run["llmengine cuda fp8"] = Within(partial(ours, fp8=True), on_cuda(contextlib.nullcontext), False)
    if head_dim not in BUILT_AHEAD and _compiler_is_here():
        run["llmengine cuda exact"] = Within(ours, on_cuda(exact_kernels))
    return run


def _compiler_is_here() -> bool:
    """Without it kernels built ahead would serve, and be timed under another's name."""
    try:
        nvrtc.load()
    except nvrtc.NvrtcError:
        return False
    return True


def by_own_products(ours: Callable[..., Tensor], x: Tensor) -> dict[str, Callable[..., Tensor]]:
    """The same by the CUDA backend's own products, which cuBLAS, or Triton, else makes: by each core that runs here."""
    if not x.is_cuda or x.dtype == torch.float32:
        return {}

    cores = ("sm80", "sm90a") if torch.cuda.get_device_capability(x.device) == HOPPER else ("sm80",)
    return {f"llmengine cuda {core}": Within(ours, on_cuda(partial(products_by, core))) for core in cores}


def gradients_at_once(ours: Callable[..., Tensor], x: Tensor, weight: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Linear cross-entropy that keeps its logits and makes gradients with the loss, where they fit: its products by
    cuBLAS and, on Hopper, by its own core."""
    if not x.is_cuda or x.dtype == torch.float32 or block_tokens(x, weight) == 0:
        return {}
    names = {"blas": "llmengine cuda at once"}
    if torch.cuda.get_device_capability(x.device) == HOPPER:
        names["sm90a"] = "llmengine cuda sm90a at once"
    call = partial(ours, recompute=False)
    return {name: Within(call, on_cuda(partial(products_by, maker))) for maker, name in names.items()}


def in_8_bits(x: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Of the linear layer, rounding among what is timed; PyTorch's has no gradient, and is timed forward alone."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) != HOPPER:
        return {}
    plainly = on_cuda(contextlib.nullcontext)
    ours = {f"llmengine fp8 {s}": Within(partial(functional.fp8_linear, scaling=s), plainly) for s in SCALINGS}
    return {**ours, "torch fp8": scaled_linear}
