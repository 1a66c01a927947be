"""The conditional random field over tags, against the enumeration of every sequence of tags."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmengine import Transformer, TransformerConfig
from llmengine.models.crf import ChainField
from llmengine.testing import assert_near

from .peers import VOCABULARY, padding_mask, random_ids

TAGS = 3
LENGTHS = [5, 1, 0, 4]
BOUNDARIES = torch.tensor([0, 5, 6, 6, 10], dtype=torch.int32)
QUIET = {"dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}


def field() -> ChainField:
    torch.manual_seed(0)
    chain = ChainField(TAGS).double()
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter)
    return chain


def score(chain: ChainField, emissions: Tensor, tags: tuple[int, ...]) -> Tensor:
    total = chain.start[tags[0]] + chain.end[tags[-1]] + sum(emissions[t, tag] for t, tag in enumerate(tags))
    return total + sum(chain.transition[a, b] for a, b in itertools.pairwise(tags))


def enumerated(chain: ChainField, emissions: Tensor, length: int) -> tuple[list[tuple[int, ...]], Tensor]:
    every = list(itertools.product(range(TAGS), repeat=length))
    return every, torch.stack([score(chain, emissions, tags) for tags in every])


def test_loss_and_gradients_are_those_of_the_enumeration():
    chain = field()
    emissions = torch.randn(sum(LENGTHS), TAGS, dtype=torch.float64, requires_grad=True)
    tags = torch.randint(TAGS, (sum(LENGTHS),))
    loss = chain.loss(emissions, tags, BOUNDARIES)
    expected = emissions.new_zeros(())
    for row, right, length in zip(emissions.split(LENGTHS), tags.split(LENGTHS), LENGTHS, strict=True):
        if length:
            _, scores = enumerated(chain, row, length)
            expected = expected + scores.logsumexp(0) - score(chain, row, tuple(right.tolist()))
    assert_near(loss, expected, 1e-12)
    wanted = (emissions, *chain.parameters())
    for got, right in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert_near(got, right, 1e-12)


def test_the_best_tags_are_those_of_the_enumeration():
    chain = field()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        emissions = torch.randn(sum(LENGTHS), TAGS, dtype=torch.float64, generator=generator)
        best = chain.best(emissions, BOUNDARIES)
        for row, found, length in zip(emissions.split(LENGTHS), best.split(LENGTHS), LENGTHS, strict=True):
            if length:
                every, scores = enumerated(chain, row, length)
                assert tuple(found.tolist()) == every[int(scores.argmax())]


def test_constraints_leave_the_best_of_what_is_allowed():
    chain = field()
    allowed = torch.tensor([[True, True, False], [True, False, True], [True, False, True]])
    begins, ends = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    changed = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        emissions = torch.randn(5, TAGS, dtype=torch.float64, generator=generator)
        cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
        every, scores = enumerated(chain, emissions, 5)
        legal = torch.tensor(
            [bool(begins[y[0]] and ends[y[-1]] and all(allowed[a, b] for a, b in itertools.pairwise(y))) for y in every]
        )
        best = chain.best(emissions, cu_seqlens, allowed, begins, ends)
        assert tuple(best.tolist()) == every[int(torch.where(legal, scores, -torch.inf).argmax())]
        changed += not torch.equal(best, chain.best(emissions, cu_seqlens))
    assert changed > 5
    assert chain.best(emissions, cu_seqlens, torch.zeros_like(allowed)).tolist() == [-1] * 5
    with pytest.raises(ValueError, match=r"constraints must be bool of shape \(3, 3\), got torch.float32 \(3, 3\)"):
        chain.best(emissions, cu_seqlens, allowed.float())


def tagger(**fields) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig.preset(
        "bert-tiny", vocab_size=VOCABULARY, d_model=32, n_heads=4, d_ff=48, objectives=["tagging"], n_labels=TAGS,
        crf=True, family="custom", **QUIET, **fields,
    )  # fmt: skip
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_only_labelled_tokens_are_links_of_the_chain():
    """The model's loss and tags: first pieces of words alone, padding or not, whole batch or one by one."""
    model = tagger().eval()
    lengths, length = [9, 4, 6], 9
    mask, ids = padding_mask("right", lengths, length), random_ids(3, length)
    first = (torch.arange(length) % 3 != 1) & (mask == 1)
    labels = torch.where(first, ids % TAGS, -100)
    out = model(ids, mask, labels=labels)
    chain, total = model.heads["tagging"].chain, 0.0
    tags = model.tags(ids, mask, among=first.long())
    for row in range(3):
        emissions = out.logits[row][first[row]]
        right = tuple(labels[row][first[row]].tolist())
        every, scores = enumerated(chain, emissions, len(right))
        total = total + scores.logsumexp(0) - score(chain, emissions, right)
        assert tuple(tags[row][first[row]].tolist()) == every[int(scores.argmax())]
    assert (tags[~first] == -1).all()
    assert_near(out.loss, total / first.sum(), 1e-5)
    parts = sum(
        model(ids[i : i + 1], mask[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=first.sum()).loss
        for i in range(3)
    )
    assert_near(parts, out.loss, 1e-6)
    assert model(ids, mask, labels=torch.full_like(ids, -100)).loss.item() == 0.0


def test_it_learns_what_may_follow_what(tmp_path):
    """Tags that alternate whatever the words are: the chain alone can know."""
    model = tagger().train()
    ids = random_ids(8, 6)
    labels = (torch.arange(6) + torch.arange(8)[:, None]) % 2
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tags = model.eval().tags(random_ids(4, 6, seed=9))
    assert (tags[:, 1:] != tags[:, :-1]).all() and (tags < 2).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(Transformer.from_pretrained(tmp_path).tags(ids), model.tags(ids))


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match='crf is for objective "tagging"'):
        TransformerConfig.preset("bert-tiny", crf=True)
    with pytest.raises(ValueError, match='tags: needs objective "tagging"'):
        Transformer(TransformerConfig.preset("bert-tiny")).tags(random_ids(1, 3))
    with pytest.raises(ValueError, match='family "bert" cannot express crf True'):
        Transformer(TransformerConfig.preset("bert-tiny", objectives=["tagging"], crf=True)).save_pretrained(tmp_path)
