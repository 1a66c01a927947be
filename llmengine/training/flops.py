"""Model FLOPs: what a training step's mathematics needs, whatever the kernels do (no recomputation, no padding)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from llmengine.data.streams import StreamPart
from llmengine.models import Transformer
from llmengine.models.config import TransformerConfig
from llmengine.objectives.electra import Electra


def forward_flops(
    config: TransformerConfig, lengths: Iterable[int], labelled: int, *, target_lengths: Iterable[int] = (),
    query_stream: int = 0, seen: int | None = None, remembered: Iterable[int] = (),
) -> int:  # fmt: skip
    """One forward of sequences of these lengths with `labelled` tokens through the token head.

    target_lengths: an encoder-decoder's target. XLNet: query_stream, the tokens that are predicted; seen, the pairs
    that the order leaves in both streams, those with memory among them (None: all); remembered, of each sequence.

    Matrix products count 2 FLOPs per multiply-add; lookups, norms, activations and softmax are not counted. Attention
    counts the pairs that its mask leaves: n^2 of a sequence of n tokens, n (n + 1) / 2 where it is causal, or those
    in a layer's window.
    """
    lengths, targets = [int(n) for n in lengths], [int(n) for n in target_lengths]
    past = [int(n) for n in remembered] or [0] * len(lengths)
    tokens, d, both = sum(lengths), config.d_model, config.architecture == "encoder_decoder"
    flops = 0
    for layer in range(config.n_layers):
        pairs = seen
        if pairs is None:
            behind = sum(n * m for n, m in zip(lengths, past, strict=True))
            pairs = _pairs(config, lengths, layer, config.causal) + behind
        flops += _attention(config, tokens + query_stream, tokens + sum(past), pairs)
        flops += _feed_forward(config, tokens + query_stream)
    if config.positions == "relative" and lengths:
        # every layer projects the encoding of every distance
        distances = 2 * max(lengths) - 1 + max(past)
        flops += config.n_layers * 2 * distances * d * config.n_heads * config.head_dim
    side = config.decoder_side
    for layer in range(config.decoder_layers if both else 0):
        flops += _attention(side, sum(targets), sum(targets), _pairs(config, targets, layer, True))
        # its keys and values are of the source
        flops += _attention(side, sum(targets), tokens, sum(n * m for n, m in zip(targets, lengths, strict=True)))
        flops += _feed_forward(side, sum(targets))
    if config.d_embed is not None:
        flops += 2 * (tokens + sum(targets)) * config.d_embed * d
    return flops + _heads(config, tokens, len(lengths), labelled)


def training_flops(
    config: TransformerConfig, micro_batches: Sequence[Mapping[str, Any]], labelled: int,
    streams: Sequence[Sequence[StreamPart]] | None = None,
) -> int:  # fmt: skip
    """Forward and backward (twice the forward: gradients of inputs and of weights) of packed micro-batches.

    streams: of texts that are read with memory. Its keys are counted as others, though nothing flows back into it.
    """
    total = _heads(config, 0, 0, labelled)
    for i, batch in enumerate(micro_batches):
        lengths = batch["cu_seqlens"].diff().tolist()
        parts: dict[str, Any] = {}
        if config.architecture == "encoder_decoder":  # without a target of its own its decoder reads the source
            parts["target_lengths"] = batch.get("decoder_cu_seqlens", batch["cu_seqlens"]).diff().tolist()
        if streams is not None:
            parts["remembered"] = [min(p.behind * config.memory_reuse, config.memory_length) for p in streams[i]]
        if "query_ranks" in batch:
            seen = _seen(batch, parts.get("remembered", [0] * len(lengths)))
            parts |= {"query_stream": len(batch["target_positions"]), "seen": seen}
        total += forward_flops(config, lengths, 0, **parts)
    return 3 * total


def model_flops(
    model: Transformer | Electra, micro_batches: Sequence[Mapping[str, Any]], labelled: int,
    streams: Sequence[Sequence[StreamPart]] | None = None,
) -> int:  # fmt: skip
    """`training_flops` of a model, or of both that are trained together."""
    parts = [model] if isinstance(model, Transformer) else [model.generator, model.discriminator]
    return sum(
        training_flops(part.config, micro_batches, labelled if part.config.token_task else 0, streams) for part in parts
    )


def _attention(config: TransformerConfig, queries: int, keys: int, pairs: int) -> int:
    """Projections, and q k^T and p v of the pairs; with relative positions q r^T too."""
    width, key_width = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
    products = 3 if config.positions == "relative" else 2
    return 2 * config.d_model * 2 * (queries * width + keys * key_width) + pairs * 2 * products * width


def _feed_forward(config: TransformerConfig, tokens: int) -> int:
    return tokens * 2 * config.d_model * config.d_ff * (3 if config.gated else 2)


def _heads(config: TransformerConfig, tokens: int, sequences: int, labelled: int) -> int:
    d = config.d_model
    width = config.embed_dim if config.head_transform else d
    token_head = labelled * 2 * (width * config.vocab_size + (d * width if config.head_transform else 0))
    pairs = 2 * len({"nsp", "sop"} & set(config.objectives))
    pooled = sequences * 2 * d * (d * (config.pooler != "none") + pairs)
    return token_head + pooled + ("rtd" in config.objectives) * tokens * 2 * d * (d + 1)


def _pairs(config: TransformerConfig, lengths: Sequence[int], layer: int, causal: bool) -> int:
    """Pairs of query and key that a layer's mask leaves."""
    if config.windowed(layer) and config.window is not None:
        # of the n - k pairs at distance k, those within the window; to both sides where it is not causal
        within = (sum(n - k for k in range(1, min(config.window, n - 1) + 1)) for n in lengths)
        return sum(n + (1 if causal else 2) * near for n, near in zip(lengths, within, strict=True))
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def _seen(batch: Mapping[str, Any], remembered: Sequence[int]) -> int:
    """Pairs that a permutation leaves in the content stream, where a token sees itself too, and in the query stream;
    both see all that a sequence remembers."""
    query, key, targets = batch["query_ranks"], batch["key_ranks"], batch["target_positions"]
    total = int((key >= query).sum())  # themselves, unseen but for that
    predicted = query.new_zeros(len(query)).index_fill(0, targets, 1) + 1  # the streams that a token queries in
    bounds = batch["cu_seqlens"].tolist()
    for (begin, end), past in zip(pairwise(bounds), remembered, strict=True):
        seen = key[begin:end].sort().values.contiguous()
        total += int(((torch.searchsorted(seen, query[begin:end]) + past) * predicted[begin:end]).sum())
    return total
