"""The attention function that Transformers' models call, and the function that makes their masks.

Transformers asks for both under one name; with the first alone, models get no mask and causality silently vanishes. Its
own mask function gives None where `is_causal` says everything, and otherwise a dense (batch, 1, queries, keys) mask.
Such a mask is nearly always a band and a padding of keys, which our kernels take as numbers and a (batch, 1, 1, keys)
mask and so skip what nobody sees. So ours returns the dense mask with that description attached: attention reads the
description, and whatever else looks at the mask, or makes another from it, has the plain tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from llmengine import functional

NAME = "llmengine"


def register(name: str = NAME) -> None:
    """Makes `attn_implementation=name` known to Transformers: the attention function and its masks. Idempotent."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)


# ---- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """A dense mask in few words: the arguments of `scaled_dot_product_attention` that say the same."""

    causal: str | None
    window_size: tuple[int, int]
    keys: Tensor | None  # (batch, keys), bool; None: all are seen
    version: int  # of the dense mask, in case somebody writes into it


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **options,
) -> Tensor | None:
    """Transformers' mask for `scaled_dot_product_attention`, with its `Band` attached where it is one."""
    # A tensor made in inference mode counts no writes (`Band.version`).
    counted = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if counted else contextlib.nullcontext():
        mask = masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, **options,
        )  # fmt: skip
    edges = band_edges(mask_function)
    static = isinstance(q_offset, int) and isinstance(kv_offset, int)
    if mask is None or edges is None or not static or torch.compiler.is_compiling():
        return mask
    offset, (left, right) = q_offset - kv_offset, edges
    if offset == 0 or (left == right == -1):
        causal = "top_left" if right == 0 else None
    elif offset == kv_length - q_length and right == 0:
        causal = "bottom_right"
    else:
        return mask
    keys = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        keys = keys[:, kv_offset : kv_offset + kv_length]
        keys = None if bool(keys.all()) else keys
    mask.llmengine_band = Band(causal, (left, -1 if causal else right), keys, mask._version)  # type: ignore[attr-defined]
    return mask


def band_edges(mask_function: Callable) -> tuple[int, int] | None:
    """How far left and right of itself a query sees (-1: without bound), or None for other patterns.

    Transformers describes a pattern by a function of indices. The two plain ones are known by identity, and a window
    by the closure that holds it; what is not recognised keeps its dense mask.
    """
    if mask_function is masking_utils.causal_mask_function:
        return -1, 0
    if mask_function is masking_utils.bidirectional_mask_function:
        return -1, -1
    parts = _closure(mask_function, "and_masks").get("mask_functions", ())
    if len(parts) != 2:
        return None
    overlay, plain = parts
    window = _closure(overlay, "sliding_window_overlay").get("sliding_window")
    if isinstance(window, int) and window > 0 and plain is masking_utils.causal_mask_function:
        return window - 1, 0
    window = _closure(overlay, "sliding_window_bidirectional_overlay").get("sliding_window")
    if isinstance(window, int) and window >= 0 and plain is masking_utils.bidirectional_mask_function:
        return window, window
    return None


def _closure(function: Callable, maker: str) -> dict:
    """What the function remembers of the call of Transformers' `maker` that made it; nothing if another made it."""
    code = getattr(function, "__code__", None)
    made = getattr(function, "__module__", None) == masking_utils.__name__
    if code is None or not made or not function.__qualname__.startswith(f"{maker}.<locals>."):
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' contract: query (batch, heads, queries, d), key and value with as many heads as the model has;
    returns (batch, queries, heads, d), and the attention weights where `output_attentions` is passed on to us (GPT-2
    keeps it to itself).

    A mask says everything: causality, window and padding. Without one, `is_causal` (or the module's own) and
    `sliding_window` do, and a single query stands at the last key. s_aux (heads,) are attention sinks, the scores of a
    key without a value (GPT-OSS); position_bias is added to the scores (T5).
    """
    band: Band | None = getattr(attention_mask, "llmengine_band", None)
    seen: dict = {}
    mask = attention_mask
    if attention_mask is not None and band is not None and band.version == attention_mask._version:
        seen = {"causal": band.causal, "window_size": band.window_size}
        mask = None if band.keys is None else band.keys[:, None, None, :]
    elif attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        seen = _without_mask(bool(causal), sliding_window, query.shape[2])
    if position_bias is not None:
        mask = _biased(mask, position_bias)
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        mask = mask.to(query.dtype)
    output, lse = functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1],
        softcap=softcap or 0.0, sinks=s_aux, return_lse=True, **seen,
    )  # fmt: skip
    weights = None
    if options.get("output_attentions"):
        mask = attention_mask if attention_mask is not None else _dense(query, key, **seen)
        weights = _weights(query, key, mask, lse, scaling, softcap, position_bias)
    return output.transpose(1, 2).contiguous(), weights


def _without_mask(causal: bool, sliding_window: int | None, queries: int) -> dict:
    left = -1 if sliding_window is None else sliding_window - 1
    if queries == 1:
        return {"causal": "bottom_right", "window_size": (left, -1)} if causal else {}
    return {"causal": "top_left", "window_size": (left, -1)} if causal else {"window_size": (left, left)}


def _weights(
    query: Tensor, key: Tensor, mask: Tensor, lse: Tensor, scaling: float | None, softcap: float | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """exp(score - lse), by the plain formula and with its (queries, keys) matrix; dropout is not in it."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.transpose(-2, -1)).to(lse.dtype) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return weights.masked_fill(lse.isneginf().unsqueeze(-1), 0.0).to(query.dtype)


def _dense(query: Tensor, key: Tensor, causal: str | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """What `_without_mask` says, as a boolean (queries, keys) mask."""
    queries, keys = query.shape[2], key.shape[2]
    place = torch.arange(queries, device=query.device)[:, None] + (keys - queries if causal == "bottom_right" else 0)
    ahead = torch.arange(keys, device=query.device) - place
    left, right = window_size[0], 0 if causal else window_size[1]
    return ((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0))


def _biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A learned bias of the scores (T5) under a mask, as one additive mask that gives the bias its gradient."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else mask + bias
