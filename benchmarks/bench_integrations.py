"""A training step (forward, backward) of Hugging Face models of few layers: eager, PyTorch's SDPA, and accelerated.

Equal weights, equal batches without padding, dropout off, float32; AdamW is the same for all and left out.

pytest benchmarks/bench_integrations.py --benchmark-only     as all suites
python benchmarks/bench_integrations.py                      round after round of all three, in processor time: for a
                                                             busy machine (take one thread)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

LAYERS, BATCH, LENGTH = 2, 4, 128
PEERS = ("llmengine", "sdpa", "eager")


def model_and_batch(family: str, peer: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "bert":
        config = transformers.BertConfig(
            num_hidden_layers=LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        kind = transformers.BertForMaskedLM
    else:
        config = transformers.GPT2Config(n_layer=LAYERS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        kind = transformers.GPT2LMHeadModel
    model = kind._from_config(config, attn_implementation="sdpa" if peer == "llmengine" else peer).train()
    if peer == "llmengine":
        from llmengine.integrations.transformers import accelerate

        accelerate(model)
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100) if family == "bert" else ids
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(family: str, peer: str) -> Callable[[], float]:
    model, inputs = model_and_batch(family, peer)

    def run() -> float:
        loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()
        return loss.item()

    return run


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def bench_hugging_face_step(side_by_side, peer, family):
    side_by_side(peer, {peer: step(family, peer)})


def main(rounds: int = 7) -> None:
    for family in ("bert", "gpt2"):
        steps = {peer: step(family, peer) for peer in PEERS}
        losses = {peer: run() for peer, run in steps.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-4, losses
        seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
        for _ in range(rounds):
            for peer, run in steps.items():
                start = time.process_time()
                run()
                seconds[peer].append(time.process_time() - start)
        medians = {peer: statistics.median(times) for peer, times in seconds.items()}
        line = ", ".join(f"{peer} {1e3 * median:.0f} ms" for peer, median in medians.items())
        ratios = ", ".join(f"{peer} {medians[peer] / medians['llmengine']:.2f}" for peer in PEERS[1:])
        print(f"{family}: {line} (ratios: {ratios}; {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
