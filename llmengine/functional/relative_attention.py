"""Attention with relative positions, segments and permutations: Transformer-XL and XLNet."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from llmengine.functional.arguments import (
    autocast,
    check_float,
    check_probability,
    check_same_device,
    check_same_dtype,
    check_tensor,
    draw_seed,
    needs_grad,
    parameter_like,
    short,
)
from llmengine.ops import relative_attention as ops

OP = "relative_attention"


@overload
def relative_attention(
    query: Tensor, key: Tensor, value: Tensor, position_key: Tensor, content_bias: Tensor, position_bias: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *, zero_distance: int,
    segment_bias: Tensor | None = None, segment_key: Tensor | None = None, query_segments: Tensor | None = None,
    key_segments: Tensor | None = None, query_positions: Tensor | None = None, query_ranks: Tensor | None = None,
    key_ranks: Tensor | None = None, include_self: bool = False, is_causal: bool = False, scale: float | None = None,
    dropout_p: float = 0.0, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def relative_attention(
    query: Tensor, key: Tensor, value: Tensor, position_key: Tensor, content_bias: Tensor, position_bias: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *, zero_distance: int,
    segment_bias: Tensor | None = None, segment_key: Tensor | None = None, query_segments: Tensor | None = None,
    key_segments: Tensor | None = None, query_positions: Tensor | None = None, query_ranks: Tensor | None = None,
    key_ranks: Tensor | None = None, include_self: bool = False, is_causal: bool = False, scale: float | None = None,
    dropout_p: float = 0.0, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_key: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    zero_distance: int,
    segment_bias: Tensor | None = None,
    segment_key: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_ranks: Tensor | None = None,
    key_ranks: Tensor | None = None,
    include_self: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose scores know how far row and key stand apart, within each of N packed sequences.

        score(i, j) = scale ((query_i + content_bias) . key_j + (query_i + position_bias) . r(p_i - j)
                             + (query_i + segment_bias) . segment_key[segments differ])

    r(d) is row d + zero_distance of `position_key`, and p_i the row's position among the keys of its sequence. Neither
    a score matrix nor a shifted copy of the position scores is held (Dai et al. 2019; Yang et al. 2019).

    Shapes: query (T, H, D), key (Tk, H, D), value (Tk, H, Dv), biases (H, D); the result is (T, H, Dv). Sequences are
    packed as in `varlen_attention`; the keys of a sequence are its memory, if it has any, and then its own tokens.

    position_key: (R, H, D), the projected encoding of each distance from -zero_distance to R - 1 - zero_distance. It
        must cover every p_i - j of a sequence; a causal call looks at none below 0. Without `query_positions` those
        are -(max_seqlen_q - 1) ... max_seqlen_k - 1: zero_distance = max_seqlen_q - 1, or 0 where causal.
    segment_bias (H, D), segment_key (2, H, D), query_segments (T,) and key_segments (Tk,) go together; segments are
        int32 and either equal (segment_key[0]) or different (segment_key[1]).
    query_positions: int32 (T,), counted within the sequence's keys; by default its rows stand at its last keys.
    query_ranks (T,), key_ranks (Tk,): int32. Row i sees key j where key_ranks[j] < query_ranks[i], and with
        include_self also the key at its own position. A permutation's order gives both streams of XLNet their masks:
        memory and whatever all may see has a lower rank than every row, and the content stream includes itself.
    is_causal: row i sees the keys at or before p_i, of those that ranks let it see.
    scale, dropout_p, return_lse: as `varlen_attention`; lse is (H, T).

    A row that sees no key gives 0, lse -inf and zero gradients. Raises ValueError or TypeError where arguments do not
    fit; where positions lie on a GPU they are not read, and distances beyond position_key give NaN.
    """
    query, key, value, position_key = _operands(query, key, value, position_key)
    content_bias = parameter_like(OP, "content_bias", content_bias, tuple(query.shape[1:]), query)
    position_bias = parameter_like(OP, "position_bias", position_bias, tuple(query.shape[1:]), query)
    segment_bias, segment_key = _segment_parameters(segment_bias, segment_key, query_segments, key_segments, query)
    numbers = _numbers_per_token(
        query, key, query_segments=query_segments, key_segments=key_segments, query_positions=query_positions,
        query_ranks=query_ranks, key_ranks=key_ranks,
    )  # fmt: skip
    boundaries = _boundaries(cu_seqlens_q, cu_seqlens_k)
    check_same_device(
        OP, query=query, key=key, value=value, position_key=position_key, content_bias=content_bias,
        position_bias=position_bias, segment_bias=segment_bias, segment_key=segment_key, query_segments=query_segments,
        key_segments=key_segments, query_positions=query_positions, query_ranks=query_ranks, key_ranks=key_ranks,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length < 0:
            raise ValueError(f"{OP}: {name} must be at least 0, got {length}")
    if query_positions is None:
        _check_cover(position_key.shape[0], zero_distance, max_seqlen_q, max_seqlen_k, is_causal)
    check_probability(OP, "dropout_p", dropout_p)
    scale = 1.0 / math.sqrt(query.shape[2]) if scale is None else float(scale)
    if not abs(scale) < math.inf:  # see cross_entropy.check_options
        raise ValueError(f"{OP}: scale must be finite, got {scale}")
    seed = draw_seed(query.device) if dropout_p > 0 else None

    operands = [_heads_first(x) for x in (query + content_bias, query + position_bias, key, value, position_key)]
    operands = [x.to(query.dtype) for x in operands]
    segment_scores = _segment_scores(query, segment_bias, segment_key)
    run = ops.RelativeAttention.apply if needs_grad(*operands, segment_scores) else ops.relative_attention_forward
    output, lse, *_ = run(
        *operands, segment_scores, *_distinct(*numbers, *boundaries), max_seqlen_q, max_seqlen_k, seed, zero_distance,
        is_causal, include_self, scale, float(dropout_p),
    )  # fmt: skip
    output, lse = output.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (output, lse) if return_lse else output


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _segment_scores(query: Tensor, bias: Tensor | None, segment_key: Tensor | None) -> Tensor | None:
    """(T, H, 2): of a row with keys of its own segment, and with those of others."""
    if bias is None or segment_key is None:
        return None
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.einsum("thd,shd->ths", (query + bias).to(wide), segment_key.to(wide)).to(wide)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _operands(*operands: Tensor) -> tuple[Tensor, ...]:
    names = ("query", "key", "value", "position_key")
    for name, tensor in zip(names, operands, strict=True):
        check_float(OP, name, tensor)
        if tensor.ndim != 3:
            raise ValueError(f"{OP}: {name} has shape {tuple(tensor.shape)}; expected (tokens, heads, head_dim)")
    operands = autocast(*operands)
    check_same_dtype(OP, **dict(zip(names, operands, strict=True)))
    query, key, value, position_key = operands
    heads, head_dim = query.shape[1:]
    if head_dim == 0 or value.shape[2] == 0:
        raise ValueError(f"{OP}: head_dim must be at least 1")
    for name, tensor in (("key", key), ("position_key", position_key)):
        if tensor.shape[1:] != query.shape[1:]:
            raise ValueError(
                f"{OP}: {name} has shape {tuple(tensor.shape)}; expected (.., {heads}, {head_dim}), heads and head_dim "
                "of query"
            )
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"{OP}: value has shape {tuple(value.shape)}; expected ({key.shape[0]}, {heads}, ..), as key has"
        )
    return operands


def _segment_parameters(bias, segment_key, query_segments, key_segments, query: Tensor):
    together = {
        "segment_bias": bias, "segment_key": segment_key, "query_segments": query_segments,
        "key_segments": key_segments,
    }  # fmt: skip
    missing = [name for name, given in together.items() if given is None]
    if missing and len(missing) < len(together):
        raise ValueError(f"{OP}: {', '.join(together)} go together; {', '.join(missing)} must be given too")
    heads, head_dim = query.shape[1:]
    bias = parameter_like(OP, "segment_bias", bias, (heads, head_dim), query)
    return bias, parameter_like(OP, "segment_key", segment_key, (2, heads, head_dim), query)


def _numbers_per_token(query: Tensor, key: Tensor, **numbers: Tensor | None) -> tuple[Tensor | None, ...]:
    if (numbers["query_ranks"] is None) != (numbers["key_ranks"] is None):
        raise ValueError(f"{OP}: query_ranks and key_ranks go together, but only one was given")
    for name, tensor in numbers.items():
        if tensor is None:
            continue
        check_tensor(OP, name, tensor)
        tokens = (query if name.startswith("query") else key).shape[0]
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != (tokens,):
            raise ValueError(
                f"{OP}: {name} must be int32 of shape ({tokens},), got {short(tensor.dtype)} {tuple(tensor.shape)}"
            )
    return tuple(numbers.values())


def _boundaries(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(OP, name, tensor)
        if tensor.dtype != torch.int32 or tensor.ndim != 1 or tensor.shape[0] == 0:
            raise ValueError(
                f"{OP}: {name} must be int32 of shape (sequences + 1,), got {short(tensor.dtype)} {tuple(tensor.shape)}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{OP}: cu_seqlens_k has {cu_seqlens_k.shape[0]} boundaries but cu_seqlens_q has {cu_seqlens_q.shape[0]}; "
            "they must be equal"
        )
    return cu_seqlens_q, cu_seqlens_k


def _check_cover(count: int, zero_distance: int, max_q: int, max_k: int, is_causal: bool) -> None:
    if max_q == 0 or max_k == 0:
        return
    first, last = 0 if is_causal else 1 - max_q, max_k - 1
    if first < -zero_distance or last >= count - zero_distance:
        raise ValueError(
            f"{OP}: position_key covers the distances {-zero_distance} to {count - 1 - zero_distance} (zero_distance "
            f"{zero_distance}), but sequences of up to {max_q} rows and {max_k} keys need {first} to {last}"
        )


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """Dynamo traces no autograd.Function that is given one tensor twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [
        t.clone() if t is not None and any(t is earlier for earlier in tensors[:i]) else t
        for i, t in enumerate(tensors)
    ]
