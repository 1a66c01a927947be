"""Regularisers beside their formulas in a few lines, and how a step is cut into micro-batches beside them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch.nn import functional

from llmengine import Transformer, TransformerConfig
from llmengine.data.examples import lengths_of
from llmengine.training.finetuning import Finetuning
from llmengine.training.regularisers import Ema, Fgm, Neftune, RDrop
from llmengine.training.run import Folder
from llmengine.training.streams import EMBEDDING_NOISE
from tests.training.finetunes import pretrained, tiny
from tests.training.runs import merged

CPU = torch.device("cpu")
SMALL = {"vocab_size": 61, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 24}
STILL = "fields={dropout: 0.0, embed_dropout: 0.0, attention_dropout: 0.0, classifier_dropout: 0.0}"


def prepared(tmp_path, *overrides: str) -> Finetuning:
    config = tiny(tmp_path, *overrides)
    run = Finetuning.prepare(config, Folder(tmp_path / "run"), CPU, print)
    run.model.train()
    return run


def gradients(run: Finetuning, batch=None) -> dict[str, torch.Tensor]:
    run.optimizer.zero_grad()
    run.gradients(run.batches[0] if batch is None else batch, step=0)
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", ["bert-tiny", "gpt-tiny"])
def test_how_a_step_is_cut_changes_nothing(tmp_path, preset):
    """All of them at once; passes differ by NEFTune's noise, as dropout's mask would depend on the cut."""
    pretrained(tmp_path / "base", preset, objectives=["mlm" if preset == "bert-tiny" else "clm"])
    tiny(tmp_path)
    cut = ("data.batch_tokens=40", "data.accumulation=3", "max_length=12")
    run = prepared(tmp_path, STILL, *cut, "neftune=5", "r_drop=1.0", "fgm=0.5")
    batch = run.batches[0]
    assert len(batch.micro_batches) == 3
    torch.manual_seed(0)
    parts = gradients(run, batch)
    torch.testing.assert_close(gradients(run, merged(batch)), parts, rtol=1e-4, atol=1e-6)
    without = gradients(prepared(tmp_path, STILL, *cut), batch)
    assert all(not torch.allclose(parts[f"model.{name}"], without[name], rtol=1e-2, atol=1e-5) for name in without
               if "qkv.weight" in name or "heads" in name)  # fmt: skip


# ---- R-Drop ----------------------------------------------------------------------------------------------------------


def classes(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p | q) of logits, summed."""
    return functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")


def yes_or_no(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    one, other = (torch.distributions.Bernoulli(logits=logits) for logits in (p, q))
    return torch.distributions.kl_divergence(one, other).mean(1).sum()


def numbers(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    one, other = (torch.distributions.Normal(logits, 1) for logits in (p, q))
    return torch.distributions.kl_divergence(one, other).mean(1).sum()


# sequences of 5, 3 and 4 tokens; labels of tokens, IGNORED at some
IDS = torch.randint(3, 61, (12,), generator=torch.Generator().manual_seed(0))
PACKED = {"input_ids": IDS, "cu_seqlens": torch.tensor([0, 5, 8, 12], dtype=torch.int32), "max_seqlen": 5}
UNLABELLED = [0, 3, 5, 9]
SOME = IDS.index_fill(0, torch.tensor(UNLABELLED), -100)
LABELLED = [t for t in range(12) if t not in UNLABELLED]
BEFORE_LABELLED = [t - 1 for t in LABELLED if t != 8]  # the first token of a sequence is predicted by none


@dataclass
class Case:
    """A head's fields and labels, how many labels there are, and KL of the logits where they are."""

    objective: str
    fields: dict
    labels: dict
    count: int
    divergence: Callable

    def model(self) -> Transformer:
        preset = "gpt-tiny" if self.objective == "clm" else "bert-tiny"
        pooler = "cls_tanh" if self.objective in ("classification", "choice") else "none"
        torch.manual_seed(1)
        fields = {**SMALL, "max_positions": 20, "dropout": 0.3, "pooler": pooler, **self.fields}
        model = Transformer(TransformerConfig.preset(preset, **fields, objectives=[self.objective])).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        return model


CASES = {
    "single": Case("classification", {"n_labels": 3}, {"labels": torch.tensor([0, -100, 2])}, 2,
                   lambda p, q: classes(p[[0, 2]], q[[0, 2]])),
    "multi": Case("classification", {"n_labels": 3, "problem": "multi"}, {"labels": torch.eye(3)}, 3, yes_or_no),
    "regression": Case("classification", {"n_labels": 2, "problem": "regression"}, {"labels": torch.ones(3, 2)}, 3,
                       numbers),
    "tagging": Case("tagging", {"n_labels": 4}, {"labels": torch.where(SOME < 0, SOME, SOME % 4)}, 8,
                    lambda p, q: classes(p[LABELLED], q[LABELLED])),
    "mlm": Case("mlm", {}, {"labels": SOME}, 8, lambda p, q: classes(p[LABELLED], q[LABELLED])),
    "clm": Case("clm", {}, {"labels": SOME}, 7, lambda p, q: classes(p[BEFORE_LABELLED], q[BEFORE_LABELLED])),
    # the second question has one choice only: nothing can differ
    "choice": Case("choice", {}, {"labels": torch.tensor([1, 0]), "choices": torch.tensor([2, 1])}, 2,
                   lambda p, q: classes(p[0], q[0])),
    # logits of both ends, (tokens, 2); the third answer lies outside of its text
    "qa": Case("qa", {}, {"start_positions": torch.tensor([1, 2, 7]), "end_positions": torch.tensor([4, 2, 9])}, 2,
               lambda p, q: sum(classes(p[s, i], q[s, i]) / 2 for s in (slice(0, 5), slice(5, 8)) for i in (0, 1))),
}  # fmt: skip


def logits_of(out) -> torch.Tensor:
    return out.logits if out.start_logits is None else torch.stack([out.start_logits, out.end_logits], -1)


@pytest.mark.parametrize("name", CASES)
def test_r_drop_is_its_formula(name):
    case = CASES[name]
    model, batch = case.model(), {**PACKED, **case.labels}
    torch.manual_seed(2)
    one, two = (model(**batch, return_logits=True) for _ in range(2))
    p, q = logits_of(one), logits_of(two)
    distance = (case.divergence(p, q) + case.divergence(q, p)) / case.count
    expected = (one.loss + two.loss) / 2 + 0.7 / 2 * distance
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters, materialize_grads=True, allow_unused=True)
    torch.manual_seed(2)
    out = RDrop(model, model, 0.7)(**batch)
    found = torch.autograd.grad(out.loss, parameters, materialize_grads=True, allow_unused=True)
    assert distance.item() > 1e-3
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.losses["r_drop"], 0.35 * distance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_r_drop_does_nothing_without_training():
    model, batch = CASES["mlm"].model(), {**PACKED, **CASES["mlm"].labels}
    out = RDrop(model, model, 0.7).eval()(**batch)
    assert set(out.losses) == {"mlm"} and torch.equal(out.loss, model.eval()(**batch).loss)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"objectives": ["mlm", "nsp"], "pooler": "cls_tanh"}, "one head"),
        ({"objectives": ["tagging"], "crf": True}, "crf"),
    ],
)
def test_what_r_drop_cannot_compare(fields, sentence):
    model = Transformer(TransformerConfig.preset("bert-tiny", **SMALL, **{"pooler": "none", **fields}))
    with pytest.raises(ValueError, match=sentence):
        RDrop(model, model, 1.0)


# ---- FGM -------------------------------------------------------------------------------------------------------------


def test_fgm_is_its_formula(tmp_path):
    run = prepared(tmp_path, STILL, "fgm=0.5")
    batch, words = merged(run.batches[0]), run.transformer.words.weight
    found = gradients(run, batch)
    before = words.detach().clone()
    run.optimizer.zero_grad()
    (micro_batch,) = batch.micro_batches
    clean = torch.autograd.grad(run.model(**micro_batch).loss, [p for p in run.model.parameters()])
    (gradient,) = (g for p, g in zip(run.model.parameters(), clean, strict=True) if p is words)
    with torch.no_grad():
        words += 0.5 * gradient / gradient.norm()
    worse = torch.autograd.grad(run.model(**micro_batch).loss, [p for p in run.model.parameters()])
    for (name, _), a, b in zip(run.model.named_parameters(), clean, worse, strict=True):
        torch.testing.assert_close(found[name], a + b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        words.copy_(before)
    run.gradients(batch, 0)
    assert torch.equal(words, before), "restored bit for bit"


def test_fgm_raises_the_loss_and_survives_no_gradient():
    words = torch.nn.Embedding(5, 3)
    before = words.weight.detach().clone()
    with Fgm(words, 1.0).perturbed():
        assert torch.equal(words.weight, before)
    words.weight.grad = torch.zeros_like(words.weight)
    with Fgm(words, 1.0).perturbed():
        assert torch.equal(words.weight, before)
    words.weight.grad = torch.eye(5, 3)
    with Fgm(words, 0.3).perturbed():
        assert (words.weight - before).norm().item() == pytest.approx(0.3)
    assert torch.equal(words.weight, before)
    with pytest.raises(ValueError, match="frozen"):
        Fgm(words.requires_grad_(False), 1.0)


# ---- NEFTune ---------------------------------------------------------------------------------------------------------


def drawn(*seeds: int, shape: tuple[int, int]) -> torch.Tensor:
    seed = int(numpy.random.SeedSequence(seeds).generate_state(1, numpy.uint64)[0])
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def test_neftune_is_its_formula(tmp_path):
    run = prepared(tmp_path, STILL, "neftune=5")
    model, batch = run.transformer, merged(run.batches[1])
    seen = []
    plain = model.words(batch.micro_batches[0]["input_ids"])
    norm = model.encoder.embeddings.word.register_forward_hook(lambda *a: seen.append(a[-1]))
    run.gradients(batch, step=1)
    norm.remove()
    (x,) = seen  # before the noise: hooks run in the order in which they were put there
    assert torch.equal(x, plain)
    stream = run.noise.stream(3, EMBEDDING_NOISE, 1)
    with stream.over(batch.micro_batches[0], first=0):
        noise = model.words(batch.micro_batches[0]["input_ids"]) - plain
    for i, part in enumerate(noise.split(lengths_of(batch.micro_batches[0]))):
        length, features = part.shape
        expected = drawn(3, EMBEDDING_NOISE, 1, 0, i, shape=(length, features)) * 5 / (length * features) ** 0.5
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(model.words(batch.micro_batches[0]["input_ids"]), plain), "the hook is gone"


def test_neftune_reads_padded_batches_and_both_sides(tmp_path):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.preset("bart-tiny", **SMALL, max_positions=20, objectives=["seq2seq"]))
    source, target = torch.randint(3, 61, (2, 6)), torch.randint(3, 61, (2, 4))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    batch = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
    noises = []
    stream = Neftune(model, 2.0).stream(7)
    with stream.over(batch, first=0):
        handle = model.words.register_forward_hook(lambda m, ids, x: noises.append(x - m.weight[ids[0]]))
        model(**batch, labels=target)
        handle.remove()
    own, other = noises
    width = 16
    wanted = [drawn(7, 0, i, shape=(n, width)) * 2 / (n * width) ** 0.5 for i, n in enumerate((6, 3))]
    torch.testing.assert_close(own, torch.cat(wanted), rtol=1e-4, atol=1e-6)
    wanted = [drawn(7, 1, i, shape=(4, width)) * 2 / (4 * width) ** 0.5 for i in range(2)]
    torch.testing.assert_close(other, torch.cat(wanted), rtol=1e-4, atol=1e-6)


# ---- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [False, True])
def test_an_average_is_its_formula(warmup):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema, expected = Ema(model, 0.9, warmup=warmup), model.weight.detach().double()
    for step in range(1, 40):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    last, place = model.weight.detach().clone(), model.weight
    with ema.applied():
        torch.testing.assert_close(model.weight.double(), expected, rtol=1e-5, atol=1e-6)
        assert model.weight is place
    assert torch.equal(model.weight, last) and set(ema.state()) == {"weight"}
