"""Every objective trains a tiny model of its kind: the loss falls, and the batches depend on no worker."""

from __future__ import annotations

import json
import math

import pytest
import torch

from llmengine import Transformer, TransformerConfig, objectives
from llmengine.data import Examples, StepBatches, Tokenizer, loader
from llmengine.data.examples import pack, tokens_of
from llmengine.training import RunConfig, train
from llmengine.training.evaluation import evaluate
from llmengine.training.samples import Samples
from tests.training.runs import corpus

SHAPE = {
    "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "max_positions": 64,
    "dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.1,
}  # fmt: skip
MODELS = {
    "denoising": {"architecture": "encoder_decoder", "embed_norm": True, "norm_place": "post", "final_norm": False},
    "span_corruption": {
        "architecture": "encoder_decoder", "positions": "buckets", "norm": "rms", "gated": True, "max_positions": None,
    },
    "sop": {"architecture": "encoder", "type_vocab_size": 2, "pooler": "cls_tanh"},
    "plm": {"architecture": "encoder", "positions": "relative", "norm_place": "post", "final_norm": False},
}  # fmt: skip
HEADS = {"denoising": {"seq2seq"}, "span_corruption": {"seq2seq"}, "plm": {"plm"}, "sop": {"mlm", "sop"}}
TOKENIZERS = {"denoising": "bart_bpe", "span_corruption": "t5_bpe", "plm": "xlnet_bpe", "sop": "wordpiece"}
each = pytest.mark.parametrize("objective", MODELS)


def tiny(directory, objective: str, **fields) -> RunConfig:
    return RunConfig.from_dict(
        {
            "corpus": str(corpus(directory)), "objective": objective, "model": SHAPE | MODELS[objective], "steps": 40,
            "tokenizer": {"vocab_size": 500}, "optimizer": {"lr": 0.01}, "every": {"evaluate": 20, "save": 20},
            "data": {"sequence_length": 32, "batch_tokens": 512, "held_out": 0.1},
        } | fields
    )  # fmt: skip


def model_of(objective: str, examples: Examples, tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    fields = {"objectives": list(examples.heads), "vocab_size": tokenizer.vocab_size}
    return Transformer(TransformerConfig.from_dict(SHAPE | MODELS[objective] | fields))


class First(Examples):
    """The first few examples of others."""

    def __init__(self, examples: Examples, count: int) -> None:
        self._examples, self._count, self.heads = examples, count, examples.heads

    def lengths(self, epoch):
        return self._examples.lengths(epoch)[: self._count]

    def __getitem__(self, place):
        return self._examples[place]


@each
def test_the_loss_falls(objective, tmp_path):
    result = train(tiny(tmp_path, objective), tmp_path / "run", observers=[Samples()])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert result.evaluation is not None and result.evaluation["losses"].keys() == HEADS[objective]
    assert result.evaluation["loss"] < 0.8 * losses[0]
    samples = (tmp_path / "run" / "samples.md").read_text()
    assert samples.count("## Step ") == 3 and "~~~~text" in samples
    saved = Transformer.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.architecture == MODELS[objective]["architecture"]


@each
def test_evaluation_is_the_mean_over_all_labels(objective, novels, request):
    """Losses and accuracies of packed batches, from every example's logits alone."""
    tokenizer = request.getfixturevalue(TOKENIZERS[objective])
    examples = First(objectives.build(objective, novels, tokenizer, sequence_length=32, seed=5), 12)
    model = model_of(objective, examples, tokenizer)
    batches = StepBatches(examples, batch_tokens=150, seed=5, shuffle=False)
    result = evaluate(model, batches, torch.device("cpu"), "fp32")
    assert result["losses"].keys() == HEADS[objective] and result["loss"] == pytest.approx(
        sum(result["losses"].values())
    )
    losses, right, count = 0.0, 0, 0
    with torch.no_grad():
        for i in range(12):
            batch = pack([examples[0, i]])
            labels = batch.pop("labels")
            pair = batch.pop("sentence_order_label", None)
            logits = model.eval()(**batch).logits[labels != -100]
            labels = labels[labels != -100]
            losses += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
            assert pair is None or len(pair) == 1
    task = model.config.token_task
    assert result["losses"][task] == pytest.approx(losses / count, rel=1e-4)
    assert math.log(result["perplexity"]) == pytest.approx(losses / count, rel=1e-4)
    accuracy = result.get("accuracy", {})
    assert accuracy.keys() == HEADS[objective] - {"seq2seq"}
    assert accuracy.get(task, right / count) == pytest.approx(right / count)


@each
def test_steps_depend_on_no_worker(objective, novels, request):
    tokenizer = request.getfixturevalue(TOKENIZERS[objective])
    examples = objectives.build(objective, novels, tokenizer, sequence_length=48, seed=5)
    batches = StepBatches(examples, batch_tokens=512, accumulation=2, seed=5)
    alone, helped = (list(loader(batches, 3, 6, workers)) for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert one.items == other.items
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert a.keys() == b.keys() and tokens_of(a) <= 512
            assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@each
def test_a_function_of_seed_epoch_and_index(objective, novels, request):
    tokenizer = request.getfixturevalue(TOKENIZERS[objective])
    one, same, other = (
        objectives.build(objective, novels, tokenizer, sequence_length=48, seed=seed) for seed in (5, 5, 6)
    )
    places = [(0, 3), (7, 3), (0, 11)]
    got = {place: one[place] for place in places}
    for place in reversed(places):
        again = same[place]
        assert again.keys() == got[place].keys()
        assert all(value.dtype == torch.int64 and torch.equal(value, again[key]) for key, value in got[place].items())
    changed = [key for key in got[0, 3] if not torch.equal(got[0, 3][key], other[0, 3][key])]
    assert changed and any(not torch.equal(got[0, 3][key], got[7, 3][key]) for key in got[0, 3])


@each
def test_accumulation_changes_nothing(objective, novels, request):
    """The gradient of a step is that of its examples one by one."""
    tokenizer = request.getfixturevalue(TOKENIZERS[objective])
    examples = objectives.build(objective, novels, tokenizer, sequence_length=24, seed=5)
    model, gradients = model_of(objective, examples, tokenizer), []
    for batch_tokens, accumulation in ((4096, 1), (256, 16)):
        step = StepBatches(
            First(examples, 12), batch_tokens=batch_tokens, accumulation=accumulation, seed=1, shuffle=False
        )[0]
        model.zero_grad()
        for micro in step.micro_batches:
            model(**micro, num_items_in_batch=step.items).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(step.micro_batches) > 1
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
