"""Relative attention under a mask that is no order of the tokens: what each row does not see, key by key.

`functional.relative_attention` knows permutations, by two numbers a token. Any other mask is rows x keys numbers
anyway, so here the scores of position and segment are made whole beside it, (heads, rows, keys) of each sequence, and
are the bias of plain attention. For masks that somebody else gives; llmengine's own objectives have orders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine import functional


def dense_relative_attention(
    query: Tensor, key: Tensor, value: Tensor, position_key: Tensor, content_bias: Tensor, position_bias: Tensor,
    hidden: Tensor, positions: Tensor, zero_distance: int, *, segment_bias: Tensor | None = None,
    segment_key: Tensor | None = None, query_segments: Tensor | None = None, key_segments: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """As `functional.relative_attention`, of sequences that all have equally many rows and keys.

    hidden: (sequences, rows, keys) bool, True where a row does not see a key. positions: (sequences * rows,), each
    row's among the keys of its sequence.
    """
    sequences, rows, keys = hidden.shape
    heads, head_dim = query.shape[1:]
    scale = head_dim**-0.5
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (query, key, value))
    distances = positions.view(sequences, rows, 1).long() - torch.arange(keys, device=hidden.device) + zero_distance

    def by(scores: Tensor, index: Tensor) -> Tensor:
        """Of (sequences, heads, rows, n) those that (sequences, rows, keys) names."""
        return scores.gather(3, index[:, None].expand(-1, heads, -1, -1))

    bias = by((q + position_bias[:, None]) @ position_key.permute(1, 2, 0), distances)
    if segment_bias is not None and segment_key is not None and query_segments is not None and key_segments is not None:
        differ = query_segments.view(sequences, rows, 1) != key_segments.view(sequences, 1, keys)
        bias = bias + by((q + segment_bias[:, None]) @ segment_key.permute(1, 2, 0), differ.long())
    bias = (bias * scale).masked_fill(hidden[:, None], -torch.inf)
    attended = functional.scaled_dot_product_attention(
        q + content_bias[:, None], k, v, bias, dropout_p=dropout_p, scale=scale
    )
    return attended.transpose(1, 2).flatten(0, 1)
