"""Model FLOPs against PyTorch's own counter, on a model of plain matrix products."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmengine import TransformerConfig
from llmengine.training.flops import forward_flops, training_flops


def plain_forward(config: TransformerConfig, lengths: list[int], labelled: int) -> None:
    """The products of one forward, sequence by sequence, attention with its full square."""
    d, v = config.d_model, config.vocab_size
    tokens = sum(lengths)
    x = torch.zeros(tokens, d)
    for _ in range(config.n_layers):
        nn.functional.linear(x, torch.zeros(3 * d, d))
        for n in lengths:
            heads = torch.zeros(config.n_heads, n, config.head_dim)
            scores = torch.bmm(heads, heads.transpose(1, 2))
            torch.bmm(scores, heads)
        nn.functional.linear(x, torch.zeros(d, d))
        nn.functional.linear(nn.functional.linear(x, torch.zeros(config.d_ff, d)), torch.zeros(d, config.d_ff))
    picked = torch.zeros(labelled, d)
    if config.head_transform:
        nn.functional.linear(picked, torch.zeros(d, d))
    nn.functional.linear(picked, torch.zeros(v, d))
    if config.pooler != "none":
        nn.functional.linear(torch.zeros(len(lengths), d), torch.zeros(d, d))
    if "nsp" in config.objectives:
        nn.functional.linear(torch.zeros(len(lengths), d), torch.zeros(2, d))


@pytest.mark.parametrize("preset", ["bert-tiny", "gpt-tiny"])
def test_as_pytorch_counts(preset):
    config = TransformerConfig.preset(preset, vocab_size=1000)
    lengths, labelled = [7, 31, 1, 64], 20
    with FlopCounterMode(display=False) as counter:
        plain_forward(config, lengths, labelled)
    expected = counter.get_total_flops()
    if config.causal:
        masked = sum(n * n - n * (n + 1) // 2 for n in lengths)
        expected -= config.n_layers * masked * 4 * config.d_model
    assert forward_flops(config, lengths, labelled) == expected


def test_a_step_is_three_forwards_of_its_micro_batches():
    config = TransformerConfig.preset("gpt-tiny", vocab_size=1000)
    batches = [{"cu_seqlens": torch.tensor([0, 4, 9])}, {"cu_seqlens": torch.tensor([0, 6])}]
    assert training_flops(config, batches, 12) == 3 * forward_flops(config, [4, 5, 6], 12)
