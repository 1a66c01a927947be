"""Fresh weights of a Transformer, as its config's init, init_std and scale_residual_init say."""

from __future__ import annotations

import math
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Embedding, Linear

from llmengine.models.crf import ChainField
from llmengine.models.heads import TokenHead
from llmengine.models.layers import Layer
from llmengine.models.relative import RelativeAttention, RelativeEmbeddings, RelativeStack
from llmengine.nn.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from llmengine.models.stack import Stack
    from llmengine.models.transformer import Transformer


@torch.no_grad()
def initialise(model: Transformer, only: tuple[str, ...] = ()) -> None:
    """N(0, init_std), zero biases, unit norms; then what the config asks for beyond that.

    Draws from PyTorch's generator of the weights' device. only: prefixes of the parameters that are made, no others.
    """
    config = model.config
    for name, module in model.named_modules():
        if only and not f"{name}.".startswith(only):
            continue
        if isinstance(module, Linear | Embedding):
            module.weight.normal_(0.0, config.init_std)
        elif isinstance(module, LayerNorm | RMSNorm):
            module.reset_parameters()
        elif isinstance(module, TokenHead) and module.weight is not None:
            module.weight.normal_(0.0, config.init_std)
        elif isinstance(module, RelativeAttention | RelativeEmbeddings | ChainField):
            for parameter in module.parameters(recurse=False):
                parameter.normal_(0.0, config.init_std)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
    if only:
        return
    stacks = [stack for stack in (model.encoder, model.decoder) if stack is not None]
    if config.scale_residual_init:
        for stack in stacks:
            for layer in stack.each_layer():
                cross = [layer.cross_attention.out] if isinstance(layer, Layer) and layer.cross_attention else []
                for last in (layer.attention.out, *cross, layer.feed_forward.down):
                    last.weight.normal_(0.0, config.init_std / math.sqrt(2 * stack.depth))
    if config.init == "neighbours":
        for stack in stacks:
            assert not isinstance(stack, RelativeStack)  # the config asks for learned positions
            _look_at_neighbours(stack, causal=stack is model.decoder)
    if config.freeze_padding_row:
        for stack in stacks:
            if (word := stack.embeddings.word) is not None:
                word.weight[config.pad_token_id].zero_()


# What a head's score at its offset exceeds those elsewhere by, at first: exp(10) against some hundred other places.
_MARGIN = 10.0


def _look_at_neighbours(stack: Stack, causal: bool) -> None:
    """Heads that begin by looking a fixed number of places to the left or right.

    Positions are p(i) = (sin f i, cos f i, …), the frequencies f spread evenly over (0, pi): nearly orthogonal to each
    other, and p(i + o) = R(o) p(i), where R(o) turns each pair by f o. A head has one random orthonormal matrix P for
    queries and keys, W_q = s P R(o) and W_k = s P, so that the score of places i and j is s^2 <P p(i + o), P p(j)>:
    large at j = i + o alone. The words' part of the score averages out, since R(o) turns it by all angles alike.
    (After Trockman & Kolter 2023, who give W_q and W_k a product near the identity, and so heads that look at
    themselves.)
    """
    config = stack.config
    d_model, head_dim = config.d_model, config.head_dim
    pairs = d_model // 2
    assert stack.embeddings.position is not None  # the config asks for learned positions
    position = stack.embeddings.position.weight
    frequencies = math.pi * (torch.arange(pairs, dtype=torch.float32, device=position.device) + 1) / (pairs + 1)
    angles = torch.arange(len(position), device=position.device)[:, None] * frequencies
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1) * math.sqrt(2) * config.init_std
    position[:, : 2 * pairs] = waves.to(position)

    # a normed row has square norm d_model, half of it position; P keeps head_dim / d_model of that; and scores are
    # divided by sqrt(head_dim)
    scale = math.sqrt(2 * _MARGIN / math.sqrt(head_dim))
    number = count()
    for layer in stack.each_layer():
        weight = layer.attention.qkv.weight.view(3, config.n_heads, head_dim, d_model)
        for head in range(config.n_heads):
            projection = torch.empty(head_dim, d_model, device=position.device)
            torch.nn.init.orthogonal_(projection)
            turned = _turned(projection, frequencies * _offset(next(number), causal))
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
