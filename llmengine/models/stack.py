"""Stack: an encoder or a decoder, from token ids to hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.utils import checkpoint as checkpointing

from llmengine.models.config import TransformerConfig
from llmengine.models.dtypes import into, into_norm
from llmengine.models.layers import Context, Embeddings, Layer, Words, add, make_norm, next_norm
from llmengine.models.layout import Attending
from llmengine.models.positions import Angles, DistanceBuckets, alibi_slopes

_torch = torch.nn.functional


class Stack(Module):
    """Embeddings, layers and the last norm.

    kind "encoder" or "decoder". Of an encoder-decoder the decoder has cross-attention and, where embeddings are shared,
    no words of its own.
    """

    def __init__(self, config: TransformerConfig, kind: str) -> None:
        super().__init__()
        self.config = config
        causal = kind == "decoder"
        self.cross = causal and config.architecture == "encoder_decoder"
        depth = config.decoder_layers if causal else config.n_layers
        self.depth = depth
        words = config.vocab_size if causal else config.source_vocab_size
        self.embeddings = Embeddings(config, None if self.cross and config.share_embeddings else words)
        self.layers = ModuleList(Layer(config, i, cross=self.cross) for i in range(1 if config.share_layers else depth))
        self.final_norm = make_norm(config, config.d_model) if config.final_norm else None
        self.distance_buckets = DistanceBuckets(config, causal) if config.positions == "buckets" else None
        self.angles = Angles(config) if config.positions == "rotary" else None
        self.slopes = alibi_slopes(config.n_heads) if config.positions == "alibi" else None

    def each_layer(self) -> Iterable[Layer]:
        """`layers`, by their type."""
        return cast("Iterable[Layer]", self.layers)

    def forward(
        self,
        layout: Attending,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        word: Words | None = None,
        memory: Tensor | None = None,
        keep: bool = False,
        checkpoint: bool = False,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(tokens,) -> the last hidden state (tokens, d_model), and, if they are to be kept, all of them.

        word: a decoder's, be it its own or the encoder's. memory: the encoder's last hidden state. checkpoint: a
        layer's inner results are computed again in the backward instead of kept (Chen et al. 2016).
        """
        config, dropout_p = self.config, self.config.dropout if self.training else 0.0
        x, residual = self.embeddings(input_ids, position_ids, token_type_ids, word), None
        context = self._context(layout, position_ids, memory, x.dtype)
        kept = [x]
        for i in range(self.depth):
            if self._skipped():
                if keep:
                    kept.append(kept[-1])
                continue
            layer = self.layers[0 if config.share_layers else i]
            first = cast("Layer", layer).attention.qkv
            x, residual = into(first, x), None if residual is None else into(first, residual)
            if checkpoint and self.training and torch.is_grad_enabled():
                x, residual = checkpointing.checkpoint(layer, x, residual, context, use_reentrant=False)
            else:
                x, residual = layer(x, residual, context)
            if keep:
                x, residual = add(x, residual, dropout_p), None
                kept.append(x)
        if self.final_norm is not None:
            x, residual = (
                into_norm(self.final_norm, x),
                None if residual is None else into_norm(self.final_norm, residual),
            )
            x = next_norm(x, residual, self.final_norm, dropout_p)[0]
        else:
            x = add(x, residual, dropout_p)
        if self.training and config.final_dropout > 0:
            x = _torch.dropout(x, config.final_dropout, True)
        kept[-1] = x
        return x, kept if keep else None

    def _context(self, layout: Attending, position_ids: Tensor, memory: Tensor | None, dtype: torch.dtype) -> Context:
        context = Context(layout, memory=memory)
        if self.angles is not None:
            context = replace(context, angles=self.angles(position_ids, dtype))
        if self.slopes is not None:
            context = replace(context, alibi_slopes=torch.tensor(self.slopes, device=position_ids.device))
        if self.distance_buckets is not None:
            context = replace(context, distance_bias=self.distance_buckets())
        return context

    def _skipped(self) -> bool:
        """Whether this step skips a layer; drawn from PyTorch's CPU generator."""
        p = self.config.layer_dropout
        return self.training and p > 0 and torch.rand(()).item() < p
