"""ELECTRA: samples follow the generator's softmax and carry no gradient, labels tell replaced tokens, losses fall."""

from __future__ import annotations

import pytest
import torch

from llmengine import Transformer, TransformerConfig, objectives
from llmengine.data import StepBatches
from llmengine.objectives.electra import Electra, sample, smaller

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
    assert 0.3 < float(out.losses["rtd"]) < 1.5


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


def test_the_generator():
    small = smaller(config(100, d_embed=16))
    assert (small.d_model, small.n_heads, small.d_ff, small.embed_dim) == (8, 1, 16, 16)
    assert smaller(config(100, d_embed=8)).d_embed is None
    with pytest.raises(ValueError, match="the embeddings are shared, but embed_dim of the generator is 8, of the dis"):
        Electra(config(100), config(100, d_model=8, n_heads=1))
    with pytest.raises(ValueError, match="discriminator must be an encoder, got 'decoder'"):
        Electra(config(100, architecture="decoder", objectives=[]))
