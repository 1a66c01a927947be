"""XLNet (Yang et al. 2019) on Transformer-XL's relative attention (Dai et al. 2019): two streams, permutations, memory.

The content stream h holds every token and knows it; the query stream g holds the predicted ones only and does not know
itself. Both share all weights, and keys and values are h's: here they are rows of one tensor (h above g), so that each
projection, norm and feed-forward runs once over both, and two calls of `functional.relative_attention` lie between.

A permutation is two numbers per token and no length x length mask: row i sees the keys whose rank is lower than its own
(and, in h, itself).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, ModuleList, Parameter
from torch.utils import checkpoint as checkpointing

from llmengine import functional
from llmengine.models.config import TransformerConfig
from llmengine.models.dtypes import into
from llmengine.models.layers import make_norm, projection
from llmengine.models.layout import Packed
from llmengine.models.memory import Memory, Recall
from llmengine.models.orders import Order
from llmengine.models.positions import waves
from llmengine.models.relative_dense import dense_relative_attention
from llmengine.nn.feed_forward import FeedForward
from llmengine.nn.fusing import add_norm, linear, touched

_torch = torch.nn.functional


@dataclass(frozen=True)
class Rows:
    """Where one stream's rows stand, as relative_attention wants it."""

    count: int
    cu_seqlens: Tensor
    longest: int
    segments: Tensor | None
    ranks: Tensor | None
    positions: Tensor | None = None
    include_self: bool = False
    hidden: Tensor | None = None
    """(sequences, rows, keys) instead of ranks; positions are then given."""


@dataclass(frozen=True)
class RelativeContext:
    """What the layers of one pass share."""

    streams: tuple[Rows, ...]
    """The content stream, and the query stream if there is one."""
    encoding: Tensor
    """(distances, d_model), dropped out."""
    zero_distance: int
    cu_seqlens_k: Tensor
    longest_k: int
    key_segments: Tensor | None
    key_ranks: Tensor | None
    causal: bool
    cached: Cached | None = None
    """Where keys and values are kept between passes; None: nowhere."""


class Cached(Protocol):
    """What remembers keys and values in generation."""

    def project(self, attention: RelativeAttention, content: Tensor, context: RelativeContext) -> Projected:
        """Those of this pass's content, and of what is remembered."""


Projected = tuple[Tensor, Tensor, Tensor]
"""Keys, values and position keys, (…, heads, head_dim)."""


class RelativeAttention(Module):
    """Attention whose scores add to q.k a term of the distance and one of the segments, each with a query bias."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, heads, head_dim = config.n_heads * config.head_dim, config.n_heads, config.head_dim
        make = projection(config)
        self.q = make(config.d_model, width, bias=False)
        self.kv = make(config.d_model, 2 * width, bias=False)
        self.r = Linear(config.d_model, width, bias=False)
        self.out = make(width, config.d_model, bias=False)
        self.content_bias = Parameter(torch.empty(heads, head_dim))
        self.position_bias = Parameter(torch.empty(heads, head_dim))
        self.segment_bias = Parameter(torch.empty(heads, head_dim))
        self.segment_key = Parameter(torch.empty(2, heads, head_dim))
        self.heads, self.head_dim = heads, head_dim
        self.dropout = config.attention_dropout

    def forward(self, x: Tensor, keys: Tensor, context: RelativeContext) -> Tensor:
        """x (rows of all streams, d_model), keys (memory and content, d_model) -> like x."""
        q = linear(self.q, x).unflatten(1, (self.heads, self.head_dim))
        k, v, r = self.project(keys, context) if context.cached is None else context.cached.project(self, keys, context)
        parts = zip(context.streams, q.split([rows.count for rows in context.streams]), strict=True)
        attended = [self._attend(rows, part, k, v, r, context) for rows, part in parts]
        together = attended[0] if len(attended) == 1 else torch.cat(attended)
        return linear(self.out, together.flatten(1))

    def _attend(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, r: Tensor, context: RelativeContext) -> Tensor:
        """One stream's (rows, heads, head_dim)."""
        options: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0}
        if rows.segments is not None:
            options |= {
                "segment_bias": self.segment_bias, "segment_key": self.segment_key, "query_segments": rows.segments,
                "key_segments": context.key_segments,
            }  # fmt: skip
        given = (q, k, v, r, self.content_bias, self.position_bias)
        if rows.hidden is not None and rows.positions is not None:
            return dense_relative_attention(*given, rows.hidden, rows.positions, context.zero_distance, **options)
        if rows.ranks is not None:
            options |= {"query_ranks": rows.ranks, "key_ranks": context.key_ranks}
        return functional.relative_attention(
            *given, rows.cu_seqlens, context.cu_seqlens_k, rows.longest, context.longest_k,
            zero_distance=context.zero_distance, query_positions=rows.positions, include_self=rows.include_self,
            is_causal=context.causal, **options,
        )  # fmt: skip

    def project(self, keys: Tensor, context: RelativeContext) -> Projected:
        """Of keys (tokens, d_model), and of every distance."""
        k, v = self.keys_and_values(keys)
        return k, v, self.r(context.encoding.to(keys.dtype)).unflatten(1, (self.heads, self.head_dim))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, ...]:
        return linear(self.kv, x).unflatten(1, (2, self.heads, self.head_dim)).unbind(1)


class RelativeLayer(Module):
    """Attention and feed-forward, post-LN, over the rows of both streams at once."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.d_model)
        self.attention = RelativeAttention(config)
        self.feed_forward_norm = make_norm(config, config.d_model)
        self.feed_forward = FeedForward(
            config.d_model, config.d_ff, activation=config.activation, dropout=config.activation_dropout,
            linear=projection(config),
        )  # fmt: skip
        self.dropout = config.dropout

    def forward(self, x: Tensor, keys: Tensor, context: RelativeContext) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        x, _ = add_norm(self.attention(x, keys, context), x, self.attention_norm, dropout_p)
        return add_norm(self.feed_forward(x), x, self.feed_forward_norm, dropout_p)[0]

    def explain(self) -> list[str]:
        """What runs fused in this layer, and why the rest does not."""
        states = [(name, touched(norm=getattr(self, name))) for name in ("attention_norm", "feed_forward_norm")]
        states.append(("feed_forward", self.feed_forward.unfused_because()))
        return [f"{name}: {'fused' if why is None else f'leaf by leaf ({why})'}" for name, why in states]


class RelativeEmbeddings(Module):
    """Words alone: positions and segments come with the scores."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        padding = config.pad_token_id if config.freeze_padding_row else None
        self.word = Embedding(config.vocab_size, config.d_model, padding_idx=padding)
        self.query_stream = Parameter(torch.empty(config.d_model))
        """What every predicted token begins with."""
        self.norm = None


class RelativeStack(Module):
    """XLNet's encoder, from token ids to the last hidden states of the predicted tokens, or else of all."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.depth = config.n_layers
        self.embeddings = RelativeEmbeddings(config)
        self.layers = ModuleList(RelativeLayer(config) for _ in range(config.n_layers))
        self.final_norm = None

    def each_layer(self) -> Iterable[RelativeLayer]:
        """`layers`, by their type."""
        return cast("Iterable[RelativeLayer]", self.layers)

    def forward(
        self,
        layout: Packed,
        input_ids: Tensor,
        segments: Tensor | None,
        order: Order | None = None,
        memory: Memory | None = None,
        *,
        keep: bool = False,
        remember: bool = False,
        checkpoint: bool = False,
    ) -> tuple[Tensor, list[Tensor] | None, Memory | None]:
        """input_ids, segments (tokens,) of the packed batch -> the last hidden states, all of h's if they are to be
        kept, and the memory for the next segment.

        memory: what the sequences remember of an earlier one. checkpoint: a layer's inner results are computed again
        in the backward instead of kept.
        """
        config, drop = self.config, self.config.embed_dropout
        x = _torch.dropout(self.embeddings.word(input_ids), drop, self.training)
        tokens = len(x)
        if order is not None and order.targets is not None:
            g = self.embeddings.query_stream.to(x.dtype).expand(len(order.targets), -1)
            x = torch.cat([x, _torch.dropout(g, drop, self.training)])
        recall = Recall(layout, memory)
        remembers = recall.next(config) if remember else ()
        context = self._context(layout, segments, order, recall, x)
        kept: list[Tensor] = [x[:tokens]]
        remembered: list[Tensor] = []
        for i, layer in enumerate(self.each_layer()):
            x = into(layer.attention.q, x)
            keys = recall.behind(None if memory is None else memory.states[i], x[:tokens])
            if remember:
                remembered.append(torch.cat([keys.detach()[part] for part in remembers]))
            if checkpoint and self.training and torch.is_grad_enabled():
                x = checkpointing.checkpoint(layer, x, keys, context, use_reentrant=False)
            else:
                x = layer(x, keys, context)
            kept.append(x[:tokens])
        result = x if len(x) == tokens else x[tokens:]
        if self.training and config.final_dropout > 0:
            result = _torch.dropout(result, config.final_dropout, True)
        lengths = tuple(part.stop - part.start for part in remembers)
        return result, kept if keep else None, Memory(tuple(remembered), lengths) if remember else None

    def _context(
        self, layout: Packed, segments: Tensor | None, order: Order | None, recall: Recall, x: Tensor
    ) -> RelativeContext:
        config, device = self.config, x.device
        starts = torch.tensor([0, *accumulate(recall.past)], dtype=torch.int32, device=device)
        longest_k, zero = recall.longest, layout.max_seqlen - 1
        encoding = _torch.dropout(self.encoding(-zero, longest_k, x), config.dropout, self.training)
        segments = None if segments is None else segments.int()
        key_segments = None if segments is None else recall.behind_each(0, segments)
        ranks = key_ranks = None
        if order is not None:
            ranks, key_ranks = order.query_ranks, recall.behind_each(-1, order.key_ranks)
        streams = [
            Rows(layout.tokens, layout.cu_seqlens, layout.max_seqlen, segments, ranks, include_self=ranks is not None)
        ]
        if order is not None and order.targets is not None and order.target_layout is not None:
            at, predicted = order.targets, order.target_layout
            # among a sequence's keys
            positions = (at + (starts[1:] - layout.cu_seqlens[:-1] - starts[:-1])[layout.sequence(at)]).int()
            streams.append(
                Rows(
                    len(at),
                    predicted.cu_seqlens,
                    predicted.max_seqlen,
                    None if segments is None else segments[at],
                    order.query_ranks[at],
                    positions,
                )
            )
        if order is not None and order.hidden is not None:
            streams = hide(streams, order.hidden, recall, config.relative_causal)
        return RelativeContext(
            tuple(streams), encoding, zero, layout.cu_seqlens + starts, longest_k, key_segments, key_ranks,
            causal=config.relative_causal,
        )  # fmt: skip

    def encoding(self, first: int, last: int, like: Tensor) -> Tensor:
        """(last - first + 1, d_model): of these distances, float32 or wider."""
        config = self.config
        distances = torch.arange(first, last + 1, device=like.device)
        if config.position_clamp is not None:
            distances = distances.clamp(-config.position_clamp, config.position_clamp)
        return waves("sinusoid_halves", distances, config.d_model).to(torch.promote_types(like.dtype, torch.float32))


def hide(streams: list[Rows], hidden: Tensor, recall: Recall, causal: bool) -> list[Rows]:
    """The content stream, and the query stream if there is one, with dense masks instead of ranks. All see what is
    remembered, and content sees itself."""
    batch, length, _ = hidden.shape
    if len({*recall.past}) > 1:
        raise ValueError("Transformer: a perm_mask that follows from no order needs mems of one length")
    past = recall.past[0]
    result = []
    for i, rows in enumerate(streams):
        if rows.count % batch or rows.longest * batch != rows.count:
            raise ValueError("Transformer: a perm_mask that follows from no order needs as many targets in each row")
        own = torch.arange(length, device=hidden.device).repeat(batch) + past
        positions = own if rows.positions is None else rows.positions.long()
        at = (positions - past).view(batch, -1, 1)
        seen_not = hidden.gather(1, at.expand(-1, -1, length))
        keys = torch.arange(length, device=hidden.device)
        if i == 0:
            seen_not = seen_not & (at != keys)
        if causal:
            seen_not = seen_not | (keys > at)
        result.append(replace(rows, positions=positions, hidden=_torch.pad(seen_not, (past, 0))))
    return result
