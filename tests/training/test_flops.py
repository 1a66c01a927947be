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


def attend(queries: int, keys: int, config: TransformerConfig) -> None:
    """Projections and products of one attention, keys shared by groups of heads."""
    d, width, key_width = config.d_model, config.n_heads * config.head_dim, config.kv_heads * config.head_dim
    nn.functional.linear(torch.zeros(queries, d), torch.zeros(width, d))
    nn.functional.linear(torch.zeros(keys, d), torch.zeros(2 * key_width, d))
    nn.functional.linear(torch.zeros(queries, width), torch.zeros(d, width))
    heads, shared = (
        torch.zeros(config.n_heads, queries, config.head_dim),
        torch.zeros(config.n_heads, config.head_dim, keys),
    )
    torch.bmm(torch.bmm(heads, shared), shared.transpose(1, 2))


def test_encoder_decoders_with_shared_keys_and_gates():
    config = TransformerConfig(
        architecture="encoder_decoder", objectives=("seq2seq",), vocab_size=300, d_model=48, n_layers=2,
        n_decoder_layers=3, n_heads=4, n_decoder_heads=6, n_kv_heads=2, d_head=10, d_ff=70, d_decoder_ff=54,
        max_positions=64, gated=True, d_embed=24,
    )  # fmt: skip
    side = config.decoder_side
    sources, targets, labelled = [7, 31, 1], [12, 3, 20], 30
    with FlopCounterMode(display=False) as counter:
        for n in sources:
            for _ in range(2):
                attend(n, n, config)
        for n, m in zip(targets, sources, strict=True):
            for _ in range(3):
                attend(n, n, side)
                attend(n, m, side)
        for tokens, layers, width in ((sum(sources), 2, 70), (sum(targets), 3, 54)):
            nn.functional.linear(torch.zeros(tokens, 24), torch.zeros(48, 24))
            for _ in range(layers * 2):
                nn.functional.linear(torch.zeros(tokens, 48), torch.zeros(width, 48))
            for _ in range(layers):
                nn.functional.linear(torch.zeros(tokens, width), torch.zeros(48, width))
        nn.functional.linear(torch.zeros(labelled, 48), torch.zeros(300, 48))
    masked = sum(n * (n - 1) // 2 for n in targets)
    expected = counter.get_total_flops() - 3 * masked * 4 * 60
    assert forward_flops(config, sources, labelled, target_lengths=targets) == expected
    batch = {
        "cu_seqlens": torch.tensor([0, *sources]).cumsum(0),
        "decoder_cu_seqlens": torch.tensor([0, *targets]).cumsum(0),
    }
    assert training_flops(config, [batch], labelled) == 3 * expected


@pytest.mark.parametrize(("causal", "window"), [(False, 3), (True, 3), (True, 100)])
def test_windows(causal, window):
    shape = {"vocab_size": 50, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 16, "max_positions": 64}
    kind = "decoder" if causal else "encoder"
    full = TransformerConfig(architecture=kind, **shape)
    half = full.replace(window=window, layer_types=["window", "full"])
    lengths = [1, 2, 5, 40]
    unseen = 0
    for n in lengths:
        distance = torch.arange(n)[:, None] - torch.arange(n)
        unseen += int(((distance.abs() > window) & ((distance >= 0) | torch.tensor(not causal))).sum())
    assert forward_flops(full, lengths, 0) - forward_flops(half, lengths, 0) == unseen * 4 * 8


def test_two_streams():
    """XLNet's pairs, counted in the dense mask."""
    config = TransformerConfig(
        architecture="encoder", objectives=("plm",), vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_ff=32,
        max_positions=None, positions="relative", norm_place="post", final_norm=False,
    )  # fmt: skip
    lengths, cu_seqlens = [9, 14], torch.tensor([0, 9, 23])
    key = torch.cat([torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in lengths])
    targets = torch.tensor([1, 4, 5, 10, 20])
    context = torch.ones(23, dtype=torch.bool).index_fill(0, targets, False)
    key[context & (torch.arange(23) % 4 > 0)] = -1
    query = key + context
    same = (torch.arange(23) < 9)[:, None] == (torch.arange(23) < 9)
    sees = (key[None, :] < query[:, None]) & same
    content, queries = sees | torch.eye(23, dtype=torch.bool), sees[targets]
    pairs = int(content.sum() + queries.sum())
    batch = {"cu_seqlens": cu_seqlens, "query_ranks": query, "key_ranks": key, "target_positions": targets}
    rows = 2 * 16 * 16 * (2 * (23 + 5) + 2 * 23) + 2 * 2 * 16 * 32 * (23 + 5) + 2 * 16 * 16 * (2 * 14 - 1)
    expected = 2 * (rows + pairs * 3 * 2 * 16) + 5 * 2 * 16 * 50
    assert training_flops(config, [batch], 5) == 3 * expected


def test_a_step_is_three_forwards_of_its_micro_batches():
    config = TransformerConfig.preset("gpt-tiny", vocab_size=1000)
    batches = [{"cu_seqlens": torch.tensor([0, 4, 9])}, {"cu_seqlens": torch.tensor([0, 6])}]
    assert training_flops(config, batches, 12) == 3 * forward_flops(config, [4, 5, 6], 12)
