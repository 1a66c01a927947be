"""Peers that are not one call of PyTorch's: FlexAttention, compiled, its products of 8-bit floats, and Liger-Kernel,
FlashAttention and Cut Cross-Entropy where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

FLEX = "flex"  # in a table of peers


def flex(tokens: int, causal: bool, sinks: bool, device: str, compiled: bool = True) -> Callable[..., Tensor]:
    """FlexAttention of (query, key, value[, sinks]): a sink shrinks its rows, whose log-sum-exp tells by how much."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    attention: Any = torch.compile(flex_attention) if compiled else flex_attention
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, row, key: row >= key, None, None, tokens, tokens, device=device)

    def call(q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> Tensor:
        if not sinks:
            return attention(q, k, v, block_mask=mask)
        output, aux = attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
        return output * torch.sigmoid(aux.lse - sink[0][:, None]).unsqueeze(-1).to(output.dtype)

    return call


def flash_attention(q: Tensor, causal: bool) -> dict[str, Callable[..., Tensor]]:
    """The packages of FlashAttention that are installed, of (query, key, value) as PyTorch has them; on a GPU alone."""
    found: dict[str, Callable[..., Tensor]] = {}
    for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        if q.is_cuda and q.dtype != torch.float32 and importlib.util.find_spec(module) is not None:
            try:
                attention = importlib.import_module(module).flash_attn_func
            except (ImportError, AttributeError):  # made for another PyTorch
                continue

            def call(q: Tensor, k: Tensor, v: Tensor, attention: Any = attention) -> Tensor:
                output = attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
                return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

            found[name] = call
    return found


def liger(x: Tensor) -> Any:
    """Liger-Kernel's functions, or None where it is not installed or x lies on no GPU."""
    if not x.is_cuda or importlib.util.find_spec("liger_kernel") is None:
        return None
    return importlib.import_module("liger_kernel.transformers.functional")


def cut_cross_entropy(x: Tensor) -> Callable[..., Tensor] | None:
    """Apple's, of (input, weight, target), where it is installed and x lies on a GPU."""
    if not x.is_cuda or importlib.util.find_spec("cut_cross_entropy") is None:
        return None
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


def torch_linear_cross_entropy(x: Tensor) -> Callable[..., Tensor] | None:
    """PyTorch's own, in chunks, where this one has it and x lies on a GPU (on a CPU it is several times slower than its
    two parts)."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    return partial(torch.nn.functional.linear_cross_entropy, options=options()) if x.is_cuda and options else None


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's linear layer in 8-bit floats, with a scale for each matrix that is found on the way."""

    def rounded(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
        return (t.float() / scale).to(torch.float8_e4m3fn), scale

    (x8, x_scale), (weight8, weight_scale) = rounded(x), rounded(weight)
    return torch._scaled_mm(x8, weight8.t(), x_scale, weight_scale, bias=bias, out_dtype=x.dtype)
