"""One whole training step (forward, backward, AdamW) of each family, beside Hugging Face on PyTorch's kernels: with its
default attention, SDPA where it has one ("torch"), with eager attention ("eager"), and under torch.compile
("compiled").

-k "mini and fp32" ran for MEASUREMENTS.md; -k base times published shapes on small batches, minutes for each family.
Equal weights, equal batches without padding, dropout off, fused AdamW on both; bf16 is autocast with float32 weights.
XLNet predicts a sixth of its tokens: Hugging Face's takes the order as a dense mask, ours as ranks.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import llmengine

PRESETS = {
    "bert": "bert-base", "gpt2": "gpt2", "xlnet": "xlnet-base", "bart": "bart-base", "t5": "t5-base",
    "modernbert": "modernbert-base", "llama": "smollm2-135m",
}  # fmt: skip
SIZES = {"mini": {"n_layers": 4, "d_model": 256, "n_heads": 4, "d_ff": 1024, "vocab_size": 8192}, "base": {}}
QUIET = ("dropout", "embed_dropout", "attention_dropout", "activation_dropout", "final_dropout")
BATCHES = {"mini": (4, 256), "base": (2, 128)}  # sequences, tokens of each
ROUNDS = {"mini": 7, "base": 5}


def config_of(family: str, size: str) -> llmengine.TransformerConfig:
    config = llmengine.TransformerConfig.preset(PRESETS[family])
    fields: dict[str, Any] = dict.fromkeys(QUIET, 0.0) | SIZES[size]
    if size == "mini":
        tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        fields |= {token: min(getattr(config, token), 8191) for token in tokens if getattr(config, token) is not None}
        fields |= {"n_kv_heads": None, "d_head": None} | ({"layer_types": None} if config.layer_types else {})
        fields |= {"head_scale": 1.0} if family == "t5" else {}
    return config.replace(**fields)


def batches(family: str, vocabulary: int, batch: int, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours and theirs."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    ids = torch.randint(10, vocabulary, (batch, length), generator=generator)
    if family in ("gpt2", "llama", "bart", "t5"):
        return ({"input_ids": ids, "labels": ids},) * 2
    if family == "xlnet":
        ranks = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)]).int()
        targets = ranks.argsort(1)[:, -length // 6 :].sort(1).values
        common = {"input_ids": ids, "labels": ids.gather(1, targets)}
        mapping = torch.nn.functional.one_hot(targets, length).float()
        mask = (ranks[:, None, :] >= ranks[:, :, None]).float()
        return (
            common | {"query_ranks": ranks, "key_ranks": ranks, "target_positions": targets},
            common | {"perm_mask": mask, "target_mapping": mapping},
        )
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.15, ids, -100)
    inputs = {"input_ids": ids, "labels": labels}
    if family == "bert":
        inputs["next_sentence_label"] = torch.arange(batch) % 2
    return inputs, inputs


@pytest.mark.parametrize("peer", ["llmengine", "torch", "eager", "compiled"])
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("family", list(PRESETS))
def bench_training_step(side_by_side, device, peer, dtype, family, size, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = config_of(family, size)
    torch.manual_seed(0)
    model = llmengine.Transformer(config).train()
    sequences, length = BATCHES[size]
    inputs, theirs = batches(family, config.vocab_size, sequences, length)
    if peer != "llmengine":
        model.save_pretrained(tmp_path)
        (architecture,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
        attention = {"attn_implementation": "eager"} if peer == "eager" else {}
        model, inputs = getattr(transformers, architecture).from_pretrained(tmp_path, **attention).train(), theirs
        model.to(device)
    call = torch.compile(model) if peer == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = call(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    side_by_side(peer, {peer: run}, flops=6 * matrices * sequences * length, rounds=ROUNDS[size])
