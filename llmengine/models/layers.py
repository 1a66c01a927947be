"""Embeddings, attention and the transformer layer, on hidden states (tokens, d_model)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module

from llmengine.models.config import TransformerConfig
from llmengine.models.layout import Attending
from llmengine.nn.feed_forward import FeedForward
from llmengine.nn.fusing import add_norm, touched
from llmengine.nn.norm import LayerNorm

_torch = torch.nn.functional


class Embeddings(Module):
    """Sum of word, position and token-type embeddings, normed if the family does so, dropped out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        padding = config.pad_token_id if config.freeze_padding_row else None
        self.word = Embedding(config.vocab_size, config.d_model, padding_idx=padding)
        self.position = Embedding(config.max_positions, config.d_model)
        self.token_type = Embedding(config.type_vocab_size, config.d_model) if config.type_vocab_size else None
        self.norm = LayerNorm(config.d_model, config.norm_eps) if config.embed_norm else None
        self.dropout = config.embed_dropout

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        x = self.word(input_ids)
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        position = self.position(position_ids)
        x = x + position if self.norm is None else add_norm(position, x, self.norm, 0.0)[0]
        return _torch.dropout(x, self.dropout, self.training) if self.dropout > 0 else x


class Attention(Module):
    """Multi-head self-attention. `qkv` holds the projections to queries, keys and values, one above the other."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.qkv = Linear(config.d_model, 3 * config.d_model)
        self.out = Linear(config.d_model, config.d_model)
        self.heads = config.n_heads
        self.dropout = config.attention_dropout
        self.layer = layer

    def forward(self, x: Tensor, layout: Attending) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        return self.out(layout.attend(q, k, v, self.layer, self.dropout if self.training else 0.0).flatten(1))


class Layer(Module):
    """Attention and feed-forward, each with a residual connection and a norm.

    A pre-LN layer hands on (what its feed-forward gave, the residual stream before adding it), so that the next norm
    adds them in its own pass; a post-LN layer hands on (its output, None).
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attention_norm = LayerNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = LayerNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(
            config.d_model, config.d_ff, activation=config.activation, dropout=config.activation_dropout
        )
        self.dropout = config.dropout

    def forward(self, x: Tensor, residual: Tensor | None, layout: Attending) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout if self.training else 0.0
        if self.pre:
            x, residual = next_norm(x, residual, self.attention_norm, dropout_p)
            x, residual = add_norm(self.attention(x, layout), residual, self.feed_forward_norm, dropout_p)
            return self.feed_forward(x), residual
        x, _ = add_norm(self.attention(x, layout), x, self.attention_norm, dropout_p)
        x, _ = add_norm(self.feed_forward(x), x, self.feed_forward_norm, dropout_p)
        return x, None

    def explain(self) -> list[str]:
        """What runs fused in this layer, and why the rest does not."""
        norms = {"attention_norm": self.attention_norm, "feed_forward_norm": self.feed_forward_norm}
        states = [(name, touched(norm=norm)) for name, norm in norms.items()]
        states.append(("feed_forward", self.feed_forward.unfused_because()))
        return [f"{name}: {'fused' if why is None else f'leaf by leaf ({why})'}" for name, why in states]


def next_norm(x: Tensor, residual: Tensor | None, norm: Module, dropout_p: float) -> tuple[Tensor, Tensor]:
    """The norm that opens a pre-LN layer or closes the stack: (normalised, residual stream)."""
    return (norm(x), x) if residual is None else add_norm(x, residual, norm, dropout_p)


def add(x: Tensor, residual: Tensor | None, dropout_p: float) -> Tensor:
    """The residual stream with what the last layer has still to add to it."""
    return x if residual is None else residual + _torch.dropout(x, dropout_p, dropout_p > 0)
