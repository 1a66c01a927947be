"""Model FLOPs: what a training step's mathematics needs, whatever the kernels do (no recomputation, no padding)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from llmengine.models.config import TransformerConfig


def forward_flops(config: TransformerConfig, lengths: Iterable[int], labelled: int) -> int:
    """One forward of sequences of these lengths with `labelled` tokens through the token head.

    Matrix products count 2 FLOPs per multiply-add; lookups, norms, activations and softmax are not counted. Attention
    counts the pairs that its mask leaves: n^2 of a sequence of n tokens, or n (n + 1) / 2 where it is causal.
    """
    lengths = [int(n) for n in lengths]
    d = config.d_model
    pairs = sum(n * (n + 1) // 2 if config.causal else n * n for n in lengths)
    layer = sum(lengths) * 2 * d * (4 * d + 2 * config.d_ff) + pairs * 2 * 2 * d  # projections, FFN; q k^T and p v
    head = labelled * 2 * d * (config.vocab_size + (d if config.head_transform else 0))
    pooled = len(lengths) * 2 * d * (d * (config.pooler != "none") + 2 * ("nsp" in config.objectives))
    return config.n_layers * layer + head + pooled


def training_flops(config: TransformerConfig, micro_batches: Iterable[Mapping[str, Tensor]], labelled: int) -> int:
    """Forward and backward (twice the forward: gradients of inputs and of weights) of packed micro-batches."""
    lengths = [n for batch in micro_batches for n in batch["cu_seqlens"].diff().tolist()]
    return 3 * forward_flops(config, lengths, labelled)
