"""Fresh weights of a Transformer, as its config's init, init_std and scale_residual_init say."""

from __future__ import annotations

import math
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Embedding, Linear

from llmengine.models.heads import TokenHead
from llmengine.nn.norm import LayerNorm

if TYPE_CHECKING:
    from llmengine.models.transformer import Transformer


@torch.no_grad()
def initialise(model: Transformer) -> None:
    """N(0, init_std), zero biases, unit norms; then what the config asks for beyond that.

    Draws from PyTorch's generator of the weights' device.
    """
    config = model.config
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            module.weight.normal_(0.0, config.init_std)
        elif isinstance(module, LayerNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, TokenHead) and module.weight is not None:
            module.weight.normal_(0.0, config.init_std)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
    if config.scale_residual_init:
        for layer in model.each_layer():
            for projection in (layer.attention.out, layer.feed_forward.down):
                projection.weight.normal_(0.0, config.init_std / math.sqrt(2 * config.n_layers))
    if config.init == "neighbours":
        _look_at_neighbours(model)
    if config.freeze_padding_row:
        model.embeddings.word.weight[config.pad_token_id].zero_()


# What a head's score at its offset exceeds those elsewhere by, at first: exp(10) against some hundred other places.
_MARGIN = 10.0


def _look_at_neighbours(model: Transformer) -> None:
    """Heads that begin by looking a fixed number of places to the left or right.

    Positions are p(i) = (sin f i, cos f i, …), the frequencies f spread evenly over (0, pi): nearly orthogonal to each
    other, and p(i + o) = R(o) p(i), where R(o) turns each pair by f o. A head has one random orthonormal matrix P for
    queries and keys, W_q = s P R(o) and W_k = s P, so that the score of places i and j is s^2 <P p(i + o), P p(j)>:
    large at j = i + o alone. The words' part of the score averages out, since R(o) turns it by all angles alike.
    (After Trockman & Kolter 2023, who give W_q and W_k a product near the identity, and so heads that look at
    themselves.)
    """
    config = model.config
    d_model, head_dim = config.d_model, config.head_dim
    pairs = d_model // 2
    position = model.embeddings.position.weight
    frequencies = math.pi * (torch.arange(pairs, dtype=torch.float32, device=position.device) + 1) / (pairs + 1)
    angles = torch.arange(config.max_positions, device=position.device)[:, None] * frequencies
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1) * math.sqrt(2) * config.init_std
    position[:, : 2 * pairs] = waves.to(position)

    # a normed row has square norm d_model, half of it position; P keeps head_dim / d_model of that; and scores are
    # divided by sqrt(head_dim)
    scale = math.sqrt(2 * _MARGIN / math.sqrt(head_dim))
    number = count()
    for layer in model.each_layer():
        weight = layer.attention.qkv.weight.view(3, config.n_heads, head_dim, d_model)
        for head in range(config.n_heads):
            projection = torch.empty(head_dim, d_model, device=position.device)
            torch.nn.init.orthogonal_(projection)
            turned = _turned(projection, frequencies * _offset(next(number), config.causal))
            weight[0, head] = (scale * turned).to(weight)
            weight[1, head] = (scale * projection).to(weight)


def _offset(head: int, causal: bool, farthest: int = 4) -> int:
    """-1, 1, -2, 2, … and round again after `farthest`; a causal head looks to the left only."""
    if causal:
        return -(1 + head % farthest)
    return (-1 if head % 2 == 0 else 1) * (1 + head // 2 % farthest)


def _turned(projection: Tensor, angles: Tensor) -> Tensor:
    """projection @ R, where R turns the pair (sin a, cos a) of columns into (sin(a + angle), cos(a + angle))."""
    pairs = 2 * len(angles)
    sine, cosine = projection[:, 0:pairs:2], projection[:, 1:pairs:2]
    turned = projection.clone()
    turned[:, 0:pairs:2] = sine * angles.cos() - cosine * angles.sin()
    turned[:, 1:pairs:2] = sine * angles.sin() + cosine * angles.cos()
    return turned
