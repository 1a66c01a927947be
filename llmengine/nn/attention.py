"""MultiheadAttention: torch.nn's module on our attention kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmengine import functional
from llmengine.functional.arguments import check_probability
from llmengine.nn import fusing

_torch = torch.nn.functional


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same constructor, state_dict and masks (a boolean True forbids), on our kernels.

    Attention weights are computed, by the plain formula with its L x S matrix, only when `need_weights` asks for them.
    Beyond torch.nn: is_causal works without an attn_mask, and a query that may attend nothing gets zeros, not NaN.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        check_probability("MultiheadAttention", "dropout", dropout)
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"MultiheadAttention: num_heads ({num_heads}) must divide embed_dim ({embed_dim})")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(query, key, value)
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

        own_keys = k.shape[1]
        k, v = self._extra_keys(k, v)
        extra = k.shape[1] - own_keys
        masked = key_padding_mask is not None or need_weights or extra > 0
        if is_causal and masked and attn_mask is None:
            attn_mask = torch.ones(q.shape[1], own_keys, dtype=torch.bool, device=q.device).triu(1)
        causal = is_causal and not masked
        mask = None if causal else merge_masks(attn_mask, key_padding_mask, q, self.num_heads, own_keys)
        if mask is not None and extra:
            mask = _torch.pad(mask, (0, extra), value=mask.dtype == torch.bool)

        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = attention_weights(q, k, mask, dropout_p)
            output = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
        output = fusing.linear(self.out_proj, output.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.is_nested:
                raise ValueError(
                    f"MultiheadAttention: {name} is a nested tensor, which is not supported; use "
                    "llmengine.functional.varlen_attention, or padding with key_padding_mask"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"MultiheadAttention: {name} has {x.dim()} dimensions, query {query.dim()}; "
                    "all must have 3, or 2 without a batch"
                )
            if x.shape[-1] != width:
                raise ValueError(f"MultiheadAttention: {name} has {x.shape[-1]} features; expected {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"MultiheadAttention: key {tuple(key.shape)} and value {tuple(value.shape)} differ in batch or length"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(
                f"MultiheadAttention: query has a batch of {query.shape[batch]}, key of {key.shape[batch]} "
                f"(batch_first={self.batch_first})"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (..., embed_dim) each, by as few matrix products as the inputs allow."""
        linear = fusing.projection()
        e, bias = self.embed_dim, self.in_proj_bias
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        if self.in_proj_weight is None:
            return (
                linear(query, self.q_proj_weight, b_q),
                linear(key, self.k_proj_weight, b_k),
                linear(value, self.v_proj_weight, b_v),
            )
        if query is key and key is value:
            q, k, v = linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
            return q, k, v
        w_q, w_kv = self.in_proj_weight.split([e, 2 * e])
        q = linear(query, w_q, b_q)
        if key is value:
            k, v = linear(key, w_kv, None if bias is None else bias[e:]).chunk(2, dim=-1)
            return q, k, v
        w_k, w_v = w_kv.chunk(2)
        return q, linear(key, w_k, b_k), linear(value, w_v, b_v)

    def _extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """add_bias_kv and add_zero_attn: one more key and value each, which every query sees."""
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1).to(k.dtype)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1).to(v.dtype)], 1)
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros(k.shape[0], 1, k.shape[2])], 1)
            v = torch.cat([v, v.new_zeros(v.shape[0], 1, v.shape[2])], 1)
        return k, v


def merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, heads: int, keys: int
) -> Tensor | None:
    """torch.nn's masks (True forbids) as one of scaled_dot_product_attention: boolean (True allows) or additive."""
    batch, queries = q.shape[:2]
    per_head = ((batch * heads, queries, keys), (batch, heads, queries, keys))
    masks = []
    for name, mask, shapes in (
        ("attn_mask", attn_mask, (((queries, keys), (1, 1, queries, keys)), per_head)),
        ("key_padding_mask", key_padding_mask, (((batch, keys), (batch, 1, 1, keys)),)),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"MultiheadAttention: {name} has dtype {mask.dtype}; allowed: bool and floating point")
        view = next((view for shape, view in shapes if tuple(mask.shape) == shape), None)
        if view is None:
            allowed = " or ".join(str(shape) for shape, _ in shapes)
            raise ValueError(f"MultiheadAttention: {name} has shape {tuple(mask.shape)}; expected {allowed}")
        masks.append(mask.reshape(view))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [additive(mask, q.dtype) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True forbids) as 0 and -inf to be added to the scores; a floating mask in that dtype."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) (batch, heads, queries, keys), dropped out; a fully masked row is zeros."""
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = functional.softmax(scores, -1)
    return _torch.dropout(weights, dropout_p, dropout_p > 0)
