"""One whole training step (forward, backward, AdamW) of BERT and GPT-2, beside Hugging Face on PyTorch's kernels.

Equal weights, equal batches without padding, dropout off, fused AdamW on both; bf16 is autocast with float32 weights.
"""

from __future__ import annotations

import pytest
import torch

import llmengine

SHAPES = {"mini": (4, 256, 4, 8192), "base": (12, 768, 12, 30522)}  # layers, width, heads, vocabulary
BATCH, LENGTH = 4, 256


def hugging_face(family: str, layers: int, width: int, heads: int, vocabulary: int) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertForPreTraining(config).train()
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


def batch(family: str, vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=generator)
    if family == "gpt2":
        return {"input_ids": ids, "labels": ids}
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.15, ids, -100)
    return {"input_ids": ids, "labels": labels, "next_sentence_label": torch.arange(BATCH) % 2}


@pytest.mark.parametrize("peer", ["llmengine", "torch"])
@pytest.mark.parametrize("size", list(SHAPES))
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def bench_training_step(side_by_side, peer, dtype, family, size, tmp_path):
    theirs = hugging_face(family, *SHAPES[size])
    theirs.save_pretrained(tmp_path)
    inputs = batch(family, SHAPES[size][3])

    def step(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def run():
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    model = llmengine.Transformer.from_pretrained(tmp_path).train() if peer == "llmengine" else theirs
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    tokens = BATCH * LENGTH
    side_by_side(peer, {peer: step(model)}, flops=6 * matrices * tokens)
