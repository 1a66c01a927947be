"""Attention: softmax of scaled scores times values, of padded batches and of packed sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from llmengine.functional.arguments import (
    autocast,
    check_boundaries,
    check_float,
    check_probability,
    check_same_device,
    check_same_dtype,
    check_tensor,
    draw_seed,
    needs_grad,
    short,
)
from llmengine.functional.attention_options import (
    UNBOUNDED,
    distance_bias_of,
    scale_and_cap,
    sides_of,
    sinks_of,
    slopes_of,
)
from llmengine.functional.fp8_attention import run_fp8
from llmengine.ops import attention as ops


@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, causal: str | None = None,
    window_size: Sequence[int] = UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None, sinks: Tensor | None = None, fp8: bool = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, causal: str | None = None,
    window_size: Sequence[int] = UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None, sinks: Tensor | None = None, fp8: bool = False, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str | None = None,
    window_size: Sequence[int] = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    fp8: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale query key^T + bias) value without the score matrix, as `torch.nn.functional`'s of that name.

    Shapes: query (..., H, L, D), key (..., Hk, S, D), value (..., Hk, S, Dv); the result is (..., H, L, Dv), in memory
    (..., L, H, Dv). Leading dimensions and heads broadcast; with `enable_gqa` each key head serves H / Hk query heads.
    Scores and their softmax are float32 (float64 for float64 inputs).

    attn_mask: boolean, True where a key is seen, or a float bias in query's dtype or float32; broadcastable to
        (..., H, L, S). A float mask gets its gradient. Masks, causality and windows combine.
    dropout_p: in [0, 1). The dropped elements depend on seed, batch, head, row and key alone (csrc/ops/philox.h).
    is_causal: row i sees the keys j <= i, whatever L and S ("top_left", PyTorch's rule). causal="bottom_right" lets
        it see j <= i + S - L, the rule of cached generation and of `varlen_attention`.
    scale: 1 / sqrt(D) unless given; any finite number.
    window_size: (left, right): row i sees keys p - left ... p + right, p = i (i + S - L for "bottom_right"); -1 is
        unbounded (Beltagy et al. 2020).
    softcap: scores become softcap tanh(scores / softcap) before masks and biases (Gemma 2); 0 is off.
    alibi_slopes: (H,) or (batch, H); -slope |j - p| is added to the scores (Press et al. 2022). Constants.
    distance_bias: (H, 2 M + 1), in query's dtype or float32; distance_bias[h, clamp(j - p, -M, M) + M] is added to the
        scores of head h, so that distances beyond M share the end entries (Raffel et al. 2020, with M the largest
        distance that their buckets tell apart). It gets its gradient, summed in a fixed order.
    sinks: (H,), in query's dtype or float32; exp(sinks[h]) joins the sum of exponentials by which each row of head h is
        divided, as a key without a value would (Agarwal et al. 2025, gpt-oss). Scale, softcap, masks, windows and
        dropout leave it alone; -inf is no sink. It gets its gradient, summed in a fixed order.
    fp8: multiply numbers that are rounded to 8-bit floats, e4m3 (relative error at most 2^-4): queries and keys, turned
        by a Walsh-Hadamard matrix so that outliers are spread over their rows, values, and probabilities; sums and
        softmax are as ever (llmengine/backends/fp8.py). Outputs err by 3 to 9 per cent where values cancel
        (MEASUREMENTS.md), lse by the errors of scores. Infinities and NaN become NaN. Of the options, causality,
        windows, a scale above 0, shared heads and sinks go with it. There is no gradient: probabilities of operands
        that are not rounded would not sum to 1 with this lse. On Hopper; elsewhere the reference computes the same,
        which shows what it would be, and is slow.
    return_lse: also return the natural log of each row's sum of exponentials, that of the sink included, (..., H, L),
        in the scores' dtype; it is differentiable.

    A row that sees no key gives 0, lse -inf (with a sink: the sink) and no gradients of query, key and value. Raises
    ValueError or TypeError where arguments do not fit, before any kernel runs.
    """
    op = "scaled_dot_product_attention"
    query, key, value = _operands(op, query, key, value)
    lead, query, key, value = _four_dimensions(op, query, key, value, enable_gqa)
    rows, head_dim = query.shape[2:]
    mask = _mask(op, attn_mask, query, lead, key.shape[2])
    slopes = slopes_of(op, alibi_slopes, query, query.shape[0], "batch")
    bias, sinks = distance_bias_of(op, distance_bias, query), sinks_of(op, sinks, query)
    check_same_device(
        op, query=query, key=key, value=value, attn_mask=mask, alibi_slopes=slopes, distance_bias=bias, sinks=sinks
    )
    band = _band(op, is_causal, causal, window_size, "top_left")
    numbers = _numbers(op, scale, softcap, dropout_p, head_dim)
    run = run_fp8 if fp8 else _run
    lengths = (None, None, rows, key.shape[2])
    output, lse = run(op, query, key, value, mask, slopes, bias, sinks, lengths, band, numbers)
    if len(lead) != 2:
        output, lse = output.reshape(*lead, *output.shape[2:]), lse.reshape(*lead, rows)
    return (output, lse) if return_lse else output


@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, dropout_p: float = 0.0, is_causal: bool = False, causal: str | None = None,
    scale: float | None = None, window_size: Sequence[int] = UNBOUNDED, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, distance_bias: Tensor | None = None, sinks: Tensor | None = None,
    fp8: bool = False, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, dropout_p: float = 0.0, is_causal: bool = False, causal: str | None = None,
    scale: float | None = None, window_size: Sequence[int] = UNBOUNDED, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, distance_bias: Tensor | None = None, sinks: Tensor | None = None,
    fp8: bool = False, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    causal: str | None = None,
    scale: float | None = None,
    window_size: Sequence[int] = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    fp8: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of N packed sequences: no padding is computed, nothing crosses a boundary.

    Shapes: query (T, H, D), key (Tk, Hk, D), value (Tk, Hk, Dv), H a multiple of Hk; the result is (T, H, Dv) and lse
    (H, T). cu_seqlens_q and cu_seqlens_k are int32 (N + 1,): sequence n owns the tokens cu_seqlens[n] ...
    cu_seqlens[n + 1] - 1, of which there may be none. Tokens after the last boundary belong to no sequence: they are
    never read, and their outputs and gradients are 0. max_seqlen_q and max_seqlen_k bound the sequences' lengths.
    Boundaries begin with 0 and never fall. GPUs do not read them back to check: where they do not hold, or a sequence
    is longer than told, the rows that they leave out are whatever the memory held, in results and in gradients.

    Options: as `scaled_dot_product_attention`, with rows and keys counted from each sequence's beginning. is_causal
    and window_size are aligned "bottom_right": the last row stands at the last key; `causal` says otherwise.
    alibi_slopes is (H,) or (N, H); distance_bias is one table, and sinks are the same, for all sequences. Dropout draws
    by (sequence, head, row, key): a packed batch drops what the padded one drops.
    """
    op = "varlen_attention"
    query, key, value = _operands(op, query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 3:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected (tokens, heads, head_dim)")
    sequences = _check_boundaries(op, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_k is cu_seqlens_q and torch.compiler.is_compiling():
        cu_seqlens_k = cu_seqlens_k.clone()  # Dynamo traces no autograd.Function that is given one tensor twice
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    _check_heads(op, query, key, value, grouped=True)
    slopes = slopes_of(op, alibi_slopes, query, sequences, "sequences")
    bias, sinks = distance_bias_of(op, distance_bias, query), sinks_of(op, sinks, query)
    check_same_device(
        op, query=query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        alibi_slopes=slopes, distance_bias=bias, sinks=sinks,
    )  # fmt: skip
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {length}")
    band = _band(op, is_causal, causal, window_size, "bottom_right")
    numbers = _numbers(op, scale, softcap, dropout_p, query.shape[3])
    run = run_fp8 if fp8 else _run
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output, lse = run(op, query, key, value, None, slopes, bias, sinks, lengths, band, numbers)
    output, lse = output.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (output, lse) if return_lse else output


def _run(op, query, key, value, mask, slopes, bias, sinks, lengths, band, numbers):
    run = ops.Attention.apply if needs_grad(query, key, value, mask, bias, sinks) else ops.attention_forward
    seed = _seed(query, numbers.dropout_p)
    output, lse, *_ = run(query, key, value, mask, slopes, bias, sinks, *lengths, seed, *band, *numbers)
    return output, lse


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Band(NamedTuple):
    left: int
    right: int
    bottom_right: bool


class _Numbers(NamedTuple):
    scale: float
    softcap: float
    dropout_p: float


def _operands(op: str, *operands: Tensor) -> tuple[Tensor, ...]:
    names = ("query", "key", "value")
    for name, tensor in zip(names, operands, strict=True):
        check_float(op, name, tensor)
    operands = query, key, value = autocast(*operands)
    if not query.dtype == key.dtype == value.dtype:
        check_same_dtype(op, query=query, key=key, value=value)
    return operands


def _check_heads(op: str, query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> None:
    """The last three dimensions: heads, tokens, head_dim."""
    (heads, _, head_dim), (key_heads, keys, key_dim) = query.shape[-3:], key.shape[-3:]
    if head_dim == 0 or value.shape[-1] == 0:
        raise ValueError(f"{op}: head_dim must be at least 1")
    if key_dim != head_dim:
        raise ValueError(f"{op}: key has head_dim {key_dim} but query has {head_dim}; they must be equal")
    if value.shape[-2] != keys:
        raise ValueError(f"{op}: value has {value.shape[-2]} tokens but key has {keys}; they must be equal")
    if not grouped:
        return
    if value.shape[-3] != key_heads:
        raise ValueError(f"{op}: value has {value.shape[-3]} heads but key has {key_heads}; they must be equal")
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(
            f"{op}: query has {heads} heads, which is no multiple of the {key_heads} heads of key and value"
        )


def _four_dimensions(op: str, query: Tensor, key: Tensor, value: Tensor, grouped: bool):
    """The result's leading dimensions with heads, and the operands as (batch, heads, tokens, head_dim)."""
    if query.ndim == key.ndim == value.ndim == 4:
        lead, others = query.shape[:2], key.shape[:2]
        if others == value.shape[:2] and (lead == others or (grouped and lead[0] == others[0])):
            _check_heads(op, query, key, value, True)
            return lead, query, key, value
    operands = (query, key, value)
    for name, tensor in zip(("query", "key", "value"), operands, strict=True):
        if tensor.ndim < 2:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected (..., heads, tokens, head_dim)")
    most = max(t.ndim for t in operands)
    query, key, value = (t[(None,) * (max(most, 4) - t.ndim)] for t in operands)
    heads = [t.shape[-3] for t in (query, key, value)]
    # one key head serves all query heads without being repeated, also where PyTorch would broadcast it
    grouped = grouped or (heads[1] == heads[2] and heads[1] in (1, heads[0]))
    _check_heads(op, query, key, value, grouped)
    shapes = [t.shape[: -3 if grouped else -2] for t in (query, key, value)]
    if not shapes[0] == shapes[1] == shapes[2]:
        try:
            common = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            hint = "" if grouped else "; enable_gqa=True shares key and value heads among query heads"
            raise ValueError(
                f"{op}: the leading dimensions of query {tuple(query.shape)}, key {tuple(key.shape)} and value "
                f"{tuple(value.shape)} do not broadcast{hint}"
            ) from None
        query, key, value = (t.expand(*common, *t.shape[len(common) :]) for t in (query, key, value))
    lead = query.shape[query.ndim - most : -2]
    if query.ndim > 4:
        query, key, value = (t.reshape(math.prod(t.shape[:-3]), *t.shape[-3:]) for t in (query, key, value))
    return lead, query, key, value


def _mask(op: str, mask: Tensor | None, query: Tensor, lead: Sequence[int], keys: int) -> Tensor | None:
    """The mask as (1|batch, 1|heads, 1|rows, 1|keys)."""
    if mask is None:
        return None
    check_tensor(op, "attn_mask", mask)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        allowed = ", ".join(dict.fromkeys(("bool (True: seen)", short(query.dtype), "float32")))
        raise ValueError(f"{op}: attn_mask has dtype {short(mask.dtype)}; allowed: {allowed}")
    full = (*lead, query.shape[2], keys)
    fits = mask.ndim <= len(full) and all(
        m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: attn_mask has shape {tuple(mask.shape)}, which does not broadcast to {full}")
    if len(full) > 4:
        mask = mask[(None,) * (len(full) - mask.ndim)]
        outer = mask.shape[:-3]
        if math.prod(outer) != 1:
            mask = mask.expand(*full[:-3], *mask.shape[-3:])
        return mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])
    return mask[(None,) * (4 - mask.ndim)]


def _band(op: str, is_causal: bool, causal: str | None, window_size: Sequence[int], alignment: str) -> _Band:
    if causal not in (None, "top_left", "bottom_right"):
        raise ValueError(f"{op}: causal must be None, 'top_left' or 'bottom_right', got {causal!r}")
    left, right = sides_of(op, window_size)
    if is_causal or causal:
        right = 0
    return _Band(left, right, (causal or alignment) == "bottom_right")


def _numbers(op: str, scale: float | None, softcap: float, dropout_p: float, head_dim: int) -> _Numbers:
    check_probability(op, "dropout_p", dropout_p)
    return _Numbers(*scale_and_cap(op, scale, softcap, head_dim), float(dropout_p))


def _seed(query: Tensor, dropout_p: float) -> Tensor | None:
    return draw_seed(query.device) if dropout_p > 0 else None


def _check_boundaries(op: str, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """The number of sequences."""
    check_boundaries(op, "cu_seqlens_q", cu_seqlens_q)
    check_boundaries(op, "cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_k has {cu_seqlens_k.shape[0]} boundaries but cu_seqlens_q has {cu_seqlens_q.shape[0]}; "
            "they must be equal"
        )
    return cu_seqlens_q.shape[0] - 1
