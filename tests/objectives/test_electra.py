"""ELECTRA: samples follow the generator's softmax and carry no gradient, labels tell replaced tokens, losses fall."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from llmengine import Transformer, TransformerConfig, objectives
from llmengine.data import StepBatches
from llmengine.objectives.electra import Electra, sample, smaller
from llmengine.training import RunConfig, train
from llmengine.training.evaluation import evaluate
from llmengine.training.flops import model_flops, training_flops
from llmengine.training.samples import Samples
from tests.cli.conftest import succeed
from tests.training.runs import corpus

from .distributions import binomial, chi_square
from .numbered import numbered

SHAPE = {
    "architecture": "encoder", "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "max_positions": 48,
    "type_vocab_size": 2, "embed_norm": True, "norm_place": "post", "final_norm": False, "init_std": 0.1,
    "dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def config(vocab_size: int, **fields) -> TransformerConfig:
    return TransformerConfig.from_dict(SHAPE | {"vocab_size": vocab_size, "objectives": ["rtd"]} | fields)


def electra(vocab_size: int, **fields) -> Electra:
    torch.manual_seed(0)
    return Electra(config(vocab_size, **fields))


def steps(documents, tokenizer, **options) -> StepBatches:
    examples = objectives.build("electra", documents, tokenizer, sequence_length=32, seed=1)
    return StepBatches(examples, seed=1, **{"batch_tokens": 512} | options)


def test_samples_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 3.0, 2.0])
    drawn = sample(logits.expand(40_000, -1))
    chi_square(torch.bincount(drawn, minlength=5).numpy(), logits.softmax(0).numpy())


def test_the_generator_sees_masks_or_the_truth():
    documents, tokenizer, _ = numbered([[3000]])
    masked = kept = 0
    for step in (steps(documents, tokenizer)[i] for i in range(5)):
        for micro in step.micro_batches:
            chosen = micro["labels"] != -100
            masked += int((micro["input_ids"][chosen] == tokenizer.mask_id).sum())
            kept += int((micro["input_ids"] == micro["labels"]).sum())
            assert step.items["read"] == sum(len(each["input_ids"]) for each in step.micro_batches)
    assert masked + kept == sum(steps(documents, tokenizer)[i].items["tokens"] for i in range(5)), "none is random"
    binomial(masked, masked + kept, 0.85)


def test_what_the_discriminator_is_given(novels, wordpiece):
    model = electra(wordpiece.vocab_size)
    given = {}
    model.discriminator.register_forward_pre_hook(
        lambda _, arguments, named: given.update(named, ids=arguments[0]), with_kwargs=True
    )
    step = steps(novels, wordpiece)[0]
    micro = step.micro_batches[0]
    model(**micro, num_items_in_batch=step.items)
    predicted = micro["labels"] != -100
    original = torch.where(predicted, micro["labels"], micro["input_ids"])
    assert torch.equal(given["ids"][~predicted], original[~predicted])
    assert torch.equal(given["labels"], (given["ids"] != original).long())
    assert 0 < given["labels"].sum() <= predicted.sum()


def test_the_loss_is_the_weighted_sum_of_both_models_losses(novels, wordpiece):
    model = electra(wordpiece.vocab_size)
    micro = steps(novels, wordpiece)[0].micro_batches[0]
    torch.manual_seed(5)
    out = model(**micro)
    assert out.losses.keys() == {"mlm", "rtd"} and out.logits.shape == micro["input_ids"].shape
    torch.testing.assert_close(out.loss, out.losses["mlm"] + 50 * out.losses["rtd"])
    expected = model.generator(**micro).loss
    torch.testing.assert_close(out.losses["mlm"], expected)
    assert 0.3 < out.losses["rtd"].item() < 1.5


def test_samples_carry_no_gradient(novels, wordpiece):
    """Of the discriminator's loss nothing reaches the generator but through the embeddings that they share."""
    model = electra(wordpiece.vocab_size)
    micro = steps(novels, wordpiece)[0].micro_batches[0]
    shared = {id(p) for p in model.discriminator.parameters()}
    own = [p for p in model.generator.parameters() if id(p) not in shared]
    assert own and model.generator.words is model.discriminator.words
    model(**micro).losses["rtd"].backward()
    assert all(p.grad is None or not p.grad.any() for p in own)
    assert model.discriminator.words.weight.grad.any()
    model.zero_grad()
    model(**micro).losses["mlm"].backward()
    assert all(p.grad is not None for p in own) and model.generator.words.weight.grad.any()


def test_accumulation_changes_nothing(novels, wordpiece, monkeypatch):
    """With samples that depend on the place alone, a step's gradient is that of its sequences one by one."""
    monkeypatch.setattr("llmengine.objectives.electra.sample", lambda logits: logits.argmax(-1))
    model, gradients = electra(wordpiece.vocab_size), []
    documents = [novels[0][:2000]]
    for batch_tokens, accumulation in ((4096, 1), (32, 64)):
        step = steps(documents, wordpiece, batch_tokens=batch_tokens, accumulation=accumulation, shuffle=False)[0]
        model.zero_grad()
        for micro in step.micro_batches:
            model(**micro, num_items_in_batch=step.items).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(step.micro_batches) > 5
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_both_losses_fall():
    """Each word is followed by its own: a generator of context learns it, and then replaced words stand out."""
    documents, tokenizer, _ = numbered([[60]])
    model = electra(tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = steps(documents * 40, tokenizer)
    losses = []
    for i in range(120):
        step, total = batches[i], torch.zeros(2)
        for micro in step.micro_batches:
            out = model(**micro, num_items_in_batch=step.items)
            out.loss.backward()
            total += torch.stack([out.losses["mlm"].detach(), out.losses["rtd"].detach()])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    begin, end = (torch.stack(part).mean(0) for part in (losses[:5], losses[-5:]))
    assert end[0] < 0.7 * begin[0] and end[1] < 0.7 * begin[1]


def test_both_models_are_ordinary_ones(novels, wordpiece, tmp_path):
    model = electra(wordpiece.vocab_size, family="electra", head_transform=True, head_bias=True, norm_eps=1e-12,
                    pad_token_id=0, freeze_padding_row=True).eval()  # fmt: skip
    micro = steps(novels, wordpiece)[0].micro_batches[0]
    for name in ("discriminator", "generator"):
        one = getattr(model, name)
        one.save_pretrained(tmp_path / name)
        batch = {k: v for k, v in micro.items() if k != "labels"}
        torch.testing.assert_close(Transformer.from_pretrained(tmp_path / name)(**batch).logits, one(**batch).logits)


def run_config(directory, **fields) -> RunConfig:
    model = {name: value for name, value in SHAPE.items() if name != "architecture"}
    return RunConfig.from_dict(
        {
            "corpus": str(corpus(directory)), "objective": "electra", "model": {"architecture": "encoder", **model},
            "steps": 30, "tokenizer": {"vocab_size": 200}, "optimizer": {"lr": 0.01},
            "data": {"sequence_length": 32, "batch_tokens": 512, "held_out": 0.1},
            "schedule": {"kind": "constant", "warmup": 0}, "every": {"evaluate": 15, "save": 10},
        } | fields
    )  # fmt: skip


def test_a_run(tmp_path):
    result = train(run_config(tmp_path), tmp_path / "run", observers=[Samples()])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record for record in records if record["kind"] == "train"]
    assert all(each["loss"] == pytest.approx(each["losses"]["mlm"] + 50 * each["losses"]["rtd"]) for each in losses)
    assert losses[-1]["losses"]["mlm"] < 0.8 * losses[0]["losses"]["mlm"]
    last = result.evaluation
    assert last["losses"].keys() == {"mlm", "rtd"} and last["accuracy"].keys() == {"rtd"}
    assert math.log(last["perplexity"]) == pytest.approx(last["losses"]["mlm"])
    assert "it was replaced" in (tmp_path / "run" / "samples.md").read_text()
    again = json.loads(succeed("evaluate", tmp_path / "run", "--json"))
    assert again["losses"] == pytest.approx(last["losses"], rel=1e-5), "samples of an evaluation are always the same"
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    unfinished = json.loads(succeed("evaluate", tmp_path / "run", "--json"))
    assert unfinished["losses"] == pytest.approx(last["losses"], rel=1e-5)


def test_the_discriminators_accuracy(novels, wordpiece):
    """Of all tokens, from the logits of each sequence on its own; the samples are those that the batch drew."""
    model = electra(wordpiece.vocab_size)
    batches, given = steps([novels[0][:3000]], wordpiece, shuffle=False), []
    model.discriminator.register_forward_pre_hook(
        lambda _, arguments, named: given.append((arguments[0], named["labels"], named["cu_seqlens"])), with_kwargs=True
    )
    result = evaluate(model, batches, torch.device("cpu"), "fp32")
    model.discriminator._forward_pre_hooks.clear()
    right = total = 0
    with torch.no_grad():
        for ids, labels, bounds in given:
            for start, end in itertools.pairwise(bounds.tolist()):
                replaced = model.discriminator(ids[None, start:end]).logits[0] > 0
                right += int((replaced == (labels[start:end] == 1)).sum())
                total += end - start
    assert 0 < right < total and result["accuracy"] == {"rtd": right / total}


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole, half = (run_config(tmp_path, steps=steps, every={"evaluate": 5, "save": 5}) for steps in (10, 5))
    train(whole, tmp_path / "whole")
    train(half, tmp_path / "halves")
    train(whole, tmp_path / "halves", resume=True)
    models = [Electra.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "halves")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not any(name.startswith("generator.encoder.embeddings.word") for name in models[0]), "shared ones once"


def test_flops_count_both_models():
    model = electra(100)
    batch = {"cu_seqlens": torch.tensor([0, 12, 30])}
    own = training_flops(model.generator.config, [batch], 5) + training_flops(model.discriminator.config, [batch], 0)
    assert model_flops(model, [batch], 5) == own > training_flops(model.discriminator.config, [batch], 0)


def test_the_generator():
    small = smaller(config(100, d_embed=16))
    assert (small.d_model, small.n_heads, small.d_ff, small.embed_dim) == (8, 1, 16, 16)
    assert smaller(config(100, d_embed=8)).d_embed is None
    with pytest.raises(ValueError, match="the embeddings are shared, but embed_dim of the generator is 8, of the dis"):
        Electra(config(100), config(100, d_model=8, n_heads=1))
    with pytest.raises(ValueError, match="discriminator must be an encoder, got 'decoder'"):
        Electra(config(100, architecture="decoder", objectives=[]))
