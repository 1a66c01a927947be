"""Embeddings, attention and the transformer layer, on hidden states (tokens, d_model)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Embedding, Identity, Linear, Module

from llmengine import functional
from llmengine.models.config import TransformerConfig
from llmengine.models.dtypes import into
from llmengine.models.layout import Attending, Scores
from llmengine.models.positions import sinusoid
from llmengine.nn.feed_forward import FeedForward
from llmengine.nn.fp8_linear import Fp8Linear
from llmengine.nn.fusing import add_norm, linear, touched, watched
from llmengine.nn.norm import LayerNorm, OffsetRMSNorm, RMSNorm

_torch = torch.nn.functional


@dataclass(frozen=True)
class Context:
    """What the layers of one pass through a stack share."""

    layout: Attending
    angles: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """(cos, sin) of full and of windowed layers, where positions are rotary."""
    alibi_slopes: Tensor | None = None
    distance_bias: Tensor | None = None
    memory: Tensor | None = None
    """What the encoder made of the source (memory tokens, d_model), for a decoder that reads one."""


def make_norm(config: TransformerConfig, features: int) -> Module:
    if config.norm == "layer":
        return LayerNorm(features, config.norm_eps, bias=config.norm_bias)
    return (RMSNorm if config.norm == "rms" else OffsetRMSNorm)(features, config.norm_eps)


def projection(config: TransformerConfig) -> Callable[..., Linear]:
    """What makes the linear leaves of layers."""
    return Linear if config.fp8 is None else partial(Fp8Linear, scaling=config.fp8)


Words = Embedding | functional.TiedEmbedding


def words_of_pass(word: Embedding, config: TransformerConfig, tokens: int) -> Words:
    """The word embedding; where it is tied and that saves time, one that gathers its gradient in a single place."""
    tied = config.tie_embeddings and config.positions != "relative" and not torch.compiler.is_compiling()
    plain = type(word) is Embedding and word.max_norm is None and not word.scale_grad_by_freq and not word.sparse
    learns = torch.is_grad_enabled() and word.weight.requires_grad
    saves = word.weight.is_cpu and tokens < word.num_embeddings
    if not (tied and plain and learns and saves) or watched("word", word) is not None:
        return word
    return functional.TiedEmbedding(word.weight, word.padding_idx)


class Embeddings(Module):
    """Sum of word, position and token-type embeddings, normed, dropped out and projected as the family does.

    words: how many; None: a decoder that shares the encoder's has no `word`, and is given it at each call.
    """

    def __init__(self, config: TransformerConfig, words: int | None) -> None:
        super().__init__()
        width = config.embed_dim
        padding = config.pad_token_id if config.freeze_padding_row else None
        self.word = None if words is None else Embedding(words, width, padding_idx=padding)
        self.position = None
        if config.positions == "learned":
            self.position = Embedding((config.max_positions or 0) + config.position_offset, width)
        self.waves = Waves(config) if config.positions.startswith("sinusoid") else None
        self.token_type = Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.norm = make_norm(config, width) if config.embed_norm else None
        self.project = Linear(width, config.d_model) if config.d_embed is not None else None
        self.offset = config.position_offset
        self.scale = config.d_model**0.5 if config.embed_scale else None
        self.dropout = config.embed_dropout

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, word: Words | None = None
    ) -> Tensor:
        word = self.word if word is None else word
        assert word is not None
        x = word(input_ids)
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)  # rounded as the weights are
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        table = self.position if self.position is not None else self.waves
        position = None if table is None else table(position_ids + self.offset).to(x.dtype)
        if self.norm is None:
            x = x if position is None else x + position
        else:
            x = self.norm(x) if position is None else add_norm(position, x, self.norm, 0.0)[0]
        x = _torch.dropout(x, self.dropout, self.training) if self.dropout > 0 else x
        return x if self.project is None else self.project(x)


class Waves:
    """A fixed table of sines and cosines; no parameter, and in no checkpoint of ours."""

    def __init__(self, config: TransformerConfig) -> None:
        rows = (config.max_positions or 0) + config.position_offset
        with torch.device("cpu"):  # a model that is read from a file is first made on "meta"
            self.table = sinusoid(config.positions, rows, config.embed_dim)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.table.device != rows.device:
            self.table = self.table.to(rows.device)
        return self.table[rows]


class Attention(Module):
    """Multi-head self-attention. `qkv` holds the projections to queries, keys and values, one above the other."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.heads = (config.n_heads, config.kv_heads, config.kv_heads)
        self.head_dim = config.head_dim
        make = projection(config)
        self.qkv = make(config.d_model, sum(self.heads) * self.head_dim, bias=config.qkv_bias)
        self.out = make(config.n_heads * self.head_dim, config.d_model, bias=config.attention_bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.windowed = config.windowed(layer)
        self.window = config.window if self.windowed else None
        self.scale, self.softcap = config.score_scale(layer), config.attention_softcap
        self.interleaved = config.rotary.interleaved
        self.dropout = config.attention_dropout
        self.layer = layer

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = linear(self.qkv, x).unflatten(1, (-1, self.head_dim)).split(self.heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.angles is not None:
            angles = context.angles[self.windowed]
            q, k = (functional.rotary_embedding(x, *angles, interleaved=self.interleaved) for x in (q, k))
        bias = context.distance_bias
        if bias is not None and bias.dtype not in (q.dtype, torch.float32):
            bias = bias.to(q.dtype)
        scores = Scores(self.scale, self.softcap, self.window, context.alibi_slopes, bias)
        dropout_p = self.dropout if self.training else 0.0
        return linear(self.out, context.layout.attend(q, k, v, self.layer, dropout_p, scores).flatten(1))


class CrossAttention(Module):
    """A decoder's tokens attend the encoder's. `kv` holds the projections to keys and values."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = config.head_dim, config.kv_heads
        make = projection(config)
        self.q = make(config.d_model, config.n_heads * self.head_dim, bias=config.qkv_bias)
        self.kv = make(config.d_model, 2 * config.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.out = make(config.n_heads * self.head_dim, config.d_model, bias=config.attention_bias)
        self.scale = config.score_scale(layer)
        self.dropout = config.attention_dropout
        self.layer = layer

    def forward(self, x: Tensor, context: Context) -> Tensor:
        def keys_and_values() -> tuple[Tensor, Tensor]:
            assert context.memory is not None
            k, v = (
                linear(self.kv, into(self.kv, context.memory)).unflatten(1, (2, self.kv_heads, self.head_dim)).unbind(1)
            )
            return k, v

        q = linear(self.q, x).unflatten(1, (-1, self.head_dim))
        dropout_p = self.dropout if self.training else 0.0
        attended = context.layout.attend_memory(q, keys_and_values, self.layer, dropout_p, Scores(self.scale))
        return linear(self.out, attended.flatten(1))


class Layer(Module):
    """Attention, in a decoder that reads an encoder cross-attention, and feed-forward: each with a residual connection
    and a norm, placed as `config.norm_place` says.

    A pre-LN layer hands on (what its feed-forward gave, the residual stream before adding it), so that the next norm
    adds them in its own pass; a post-LN layer hands on (its output, None).
    """

    def __init__(self, config: TransformerConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        d = config.d_model
        self.place = config.norm_place
        self.attention_norm = make_norm(config, d) if layer or config.first_norm else Identity()
        self.attention = Attention(config, layer)
        self.cross_attention_norm = make_norm(config, d) if cross else None
        self.cross_attention = CrossAttention(config, layer) if cross else None
        self.feed_forward_norm = make_norm(config, d)
        self.feed_forward = FeedForward(
            d, config.d_ff, activation=config.activation, gated=config.gated, dropout=config.activation_dropout,
            bias=config.feed_forward_bias, linear=projection(config),
        )  # fmt: skip
        sandwich = config.norm_place == "sandwich"
        self.attention_post_norm = make_norm(config, d) if sandwich else None
        self.cross_attention_post_norm = make_norm(config, d) if sandwich and cross else None
        self.feed_forward_post_norm = make_norm(config, d) if sandwich else None
        self.dropout = config.dropout

    def blocks(self, context: Context) -> Iterator[tuple[Module, Callable[[Tensor], Tensor], Module | None]]:
        """(norm, block, norm of the block's result) in the order of computation."""
        yield self.attention_norm, lambda x: self.attention(x, context), self.attention_post_norm
        if (cross := self.cross_attention) is not None and self.cross_attention_norm is not None:
            yield self.cross_attention_norm, lambda x: cross(x, context), self.cross_attention_post_norm
        yield self.feed_forward_norm, self.feed_forward, self.feed_forward_post_norm

    def forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout if self.training else 0.0
        if self.place == "parallel":
            x, residual = next_norm(x, residual, self.attention_norm, dropout_p)
            # The feed-forward adds the residual itself, unless somebody looks on or it is dropped out.
            drops = dropout_p > 0 or watched("feed_forward", self.feed_forward) is not None
            added = self.feed_forward(self.feed_forward_norm(residual), None if drops else residual)
            return self.attention(x, context), add(added, residual if drops else None, dropout_p)
        for norm, block, post_norm in self.blocks(context):
            if self.place == "post":
                x, _ = add_norm(block(x), x, norm, dropout_p)
                continue
            x, residual = next_norm(x, residual, norm, dropout_p)
            x = block(x) if post_norm is None else post_norm(block(x))
        return x, residual

    def explain(self) -> list[str]:
        """What runs fused in this layer, and why the rest does not."""
        norms = {name: norm for name, norm in self.named_children() if name.endswith("_norm")}
        states = [(name, touched(norm=norm)) for name, norm in norms.items() if type(norm) is not Identity]
        states.append(("feed_forward", self.feed_forward.unfused_because()))
        return [f"{name}: {'fused' if why is None else f'leaf by leaf ({why})'}" for name, why in states]


def next_norm(x: Tensor, residual: Tensor | None, norm: Module, dropout_p: float) -> tuple[Tensor, Tensor]:
    """The norm that opens a pre-LN layer or closes the stack: (normalised, residual stream)."""
    return (norm(x), x) if residual is None else add_norm(x, residual, norm, dropout_p)


def add(x: Tensor, residual: Tensor | None, dropout_p: float) -> Tensor:
    """The residual stream with what the last layer has still to add to it."""
    return x if residual is None else residual + _torch.dropout(x, dropout_p, dropout_p > 0)
