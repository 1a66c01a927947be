"""XLNet: both streams, orders, targets, segments and memory, against Hugging Face's with equal weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmengine import Transformer
from llmengine.models.memory import Memory
from llmengine.testing import assert_near

from .peers import gradients_as_theirs, gradients_of, hf_model, ours_of, padding_mask, random_ids

BATCH, LENGTH, TARGETS = 3, 9, 4


def order(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(query_ranks, key_ranks, target_positions) of a random permutation; some tokens are context for all."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(BATCH)]).int()
    targets = rank.argsort(1)[:, -TARGETS:].sort(1).values  # the last in the order
    key_ranks = rank.clone()
    context = torch.ones_like(rank, dtype=torch.bool).scatter(1, targets, False)
    context[:, ::2] = False
    key_ranks[context] = -1
    return rank, key_ranks, targets


def dense(query_ranks: Tensor, key_ranks: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The same as Hugging Face takes it."""
    return {
        "perm_mask": (key_ranks[:, None, :] >= query_ranks[:, :, None]).float(),
        "target_mapping": torch.nn.functional.one_hot(targets, LENGTH).float(),
    }


def memory(model) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(5, BATCH, model.config.d_model, generator=generator) for _ in range(3)]


def compare_gradients(ours: Transformer, theirs: torch.nn.Module) -> None:
    expected, got = gradients_of(theirs), gradients_as_theirs(ours)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(got[name], gradient, 1e-5, name)


@pytest.mark.parametrize("dense_masks", [False, True], ids=["ranks", "masks"])
@pytest.mark.parametrize("past", [False, True], ids=["alone", "mems"])
@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("kind", ["plain", "clamped"])
def test_permutation_language_model(kind, segments, past, dense_masks, tmp_path):
    theirs = hf_model("XLNetLMHeadModel", clamp_len=4 if kind == "clamped" else -1)
    ours = ours_of(theirs, tmp_path)
    ids, ranks = random_ids(BATCH, LENGTH), order(3)
    labels = ids.gather(1, ranks[2])
    batch = {"input_ids": ids, "labels": labels}
    if segments:
        batch["token_type_ids"] = (torch.arange(LENGTH) // 4).expand(BATCH, -1)
    if past:
        batch["mems"] = memory(theirs)
    told = (
        dense(*ranks)
        if dense_masks
        else dict(zip(("query_ranks", "key_ranks", "target_positions"), ranks, strict=True))
    )
    expected = theirs(**batch, **dense(*ranks), use_mems=True)
    got = ours(**batch, **told, use_mems=True)
    assert_near(got.logits, expected.logits, 1e-5, "logits")
    assert_near(got.loss, expected.loss, 1e-5, "loss")
    for a, b in zip(got.mems, expected.mems, strict=True):
        assert_near(a, b, 1e-5, "mems")
        assert not a.requires_grad
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)


@pytest.mark.parametrize("kind", ["bi", "uni"])
@pytest.mark.parametrize("past", [False, True], ids=["alone", "mems"])
@pytest.mark.parametrize("targets", [False, True], ids=["content", "targets"])
@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
def test_a_mask_that_is_no_order(segments, targets, past, kind, tmp_path):
    """Any perm_mask in which a token sees another: logits, memory and gradients are Hugging Face's."""
    theirs = hf_model("XLNetLMHeadModel", attn_type=kind)
    ours = ours_of(theirs, tmp_path)
    ids, generator = random_ids(BATCH, LENGTH), torch.Generator().manual_seed(4)
    mask = (torch.rand(BATCH, LENGTH, LENGTH, generator=generator) < 0.5).float()
    mask[:, :, 0] = 0  # a row that sees nothing is the mean of all to them, and zero to us
    rows = slice(1 if kind == "uni" else BATCH)  # theirs adds both masks for one sequence only
    batch = {"input_ids": ids, "perm_mask": mask}
    at = torch.tensor([[1, 4, 8], [2, 3, 5], [8, 7, 1]])
    if targets:
        batch["target_mapping"] = torch.nn.functional.one_hot(at, LENGTH).float()
    if segments:
        batch["token_type_ids"] = (torch.arange(LENGTH) // 4).expand(BATCH, -1)
    if past:
        batch["mems"] = memory(theirs)
    batch["labels"] = ids.gather(1, at) if targets else ids
    batch = {name: [x[:, rows] for x in given] if name == "mems" else given[rows] for name, given in batch.items()}
    expected, got = (model(**batch, use_mems=True) for model in (theirs, ours))
    assert_near(got.logits, expected.logits, 1e-5, "logits")
    assert_near(got.loss, expected.loss, 1e-5, "loss")
    for a, b in zip(got.mems, expected.mems, strict=True):
        assert_near(a, b, 1e-5, "mems")
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)


@pytest.mark.parametrize(("side", "kind"), [("none", "bi"), ("left", "bi"), ("right", "bi"), ("none", "uni")])
def test_content_stream(side, kind, tmp_path):
    """Without an order: an encoder that sees everything, or what precedes, padded on either side."""
    theirs = hf_model("XLNetLMHeadModel", attn_type=kind)
    ours = ours_of(theirs, tmp_path)
    mask = padding_mask(side, [9, 4, 6], LENGTH)
    ids = random_ids(BATCH, LENGTH)
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    batch = {"input_ids": ids, "token_type_ids": ids % 2} | ({} if mask is None else {"attention_mask": mask})
    labels = torch.where(real, ids, -100)
    expected = theirs(**batch)
    got = ours(**batch, labels=labels)
    assert_near(got.logits[real], expected.logits[real], 1e-5, "logits")
    loss = torch.nn.functional.cross_entropy(expected.logits[real], ids[real])
    assert_near(got.loss, loss, 1e-5)
    loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)


def test_padded_targets(tmp_path):
    """Sequences of several lengths with several numbers of targets: each as it is alone."""
    ours = ours_of(hf_model("XLNetLMHeadModel"), tmp_path)
    lengths = [9, 4, 6]
    mask = padding_mask("right", lengths, LENGTH)
    ids = random_ids(BATCH, LENGTH)
    ranks = torch.stack(
        [torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(BATCH)]
    ).int()
    targets = torch.tensor([[0, 3, 8], [1, -1, -1], [2, 5, -1]])
    labels = torch.where(targets >= 0, ids.gather(1, targets.clamp(min=0)), -100)
    out = ours(
        ids, mask, query_ranks=ranks, key_ranks=ranks, target_positions=targets, labels=labels,
        num_items_in_batch=1,
    )  # fmt: skip
    total = 0.0
    for row, length in enumerate(lengths):
        at = targets[row][targets[row] >= 0][None]
        part = slice(row, row + 1), slice(0, length)
        alone = ours(
            ids[part], query_ranks=ranks[part], key_ranks=ranks[part], target_positions=at,
            labels=ids[part].gather(1, at), num_items_in_batch=1,
        )  # fmt: skip
        assert_near(out.logits[row, : at.shape[1]], alone.logits[0], 1e-5)
        assert (out.logits[row, at.shape[1] :] == 0).all()
        total = total + alone.loss
    assert_near(out.loss, total, 1e-5)


def test_predictions_follow_the_order(tmp_path):
    """An earlier target's token changes a later target's logits; a later one never changes an earlier one's, nor does
    a target's own."""
    ours = ours_of(hf_model("XLNetLMHeadModel"), tmp_path)
    ids, (query_ranks, key_ranks, targets) = random_ids(BATCH, LENGTH), order(5)
    key_ranks = query_ranks.clone()

    def logits(ids: Tensor) -> Tensor:
        return ours(ids, query_ranks=query_ranks, key_ranks=key_ranks, target_positions=targets).logits[0]

    before = logits(ids)
    ranks = query_ranks[0][targets[0]]
    for changed in range(TARGETS):
        other = ids.clone()
        other[0, targets[0, changed]] = (other[0, targets[0, changed]] + 5) % 50 + 3
        moved = (logits(other) - before).abs().amax(1)
        assert ((moved > 1e-4) == (ranks > ranks[changed])).all(), (ranks, changed, moved)


def test_a_long_text_in_segments(tmp_path):
    """A causal model that reads segments with memory gives what it gives for the whole text."""
    theirs = hf_model("XLNetLMHeadModel", attn_type="uni", mem_len=None)
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(2, 12)
    whole, mems, parts = ours(ids).logits, None, []
    for segment in ids.split(4, 1):
        out = ours(segment, mems=mems, use_mems=True)
        mems = out.mems
        parts.append(out.logits)
    assert_near(torch.cat(parts, 1), whole, 1e-5)


@pytest.mark.parametrize(("length", "reuse"), [(0, 0), (7, 0), (7, 3)], ids=["all", "last", "reuse"])
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_sequences_that_remember_unequally_much(form, length, reuse, tmp_path):
    """Each as it is alone, with Hugging Face's form of mems; the first of them has nothing to remember."""
    theirs = hf_model("XLNetLMHeadModel", mem_len=length or None, reuse_len=reuse or None)
    ours = ours_of(theirs, tmp_path)
    sizes, pasts = [4, LENGTH, 6], [0, 5, 2]
    generator = torch.Generator().manual_seed(5)
    remembered = [torch.randn(3, past, 32, generator=generator) for past in pasts]
    ids = [random_ids(size, seed=size) for size in sizes]
    ranks = [torch.randperm(size, generator=generator).int() for size in sizes]
    targets = [rank.argsort()[-2:].sort().values for rank in ranks]
    told = {"mems": Memory.join(remembered, remembered[0][:, :0]), "use_mems": True}
    if form == "packed":
        bounds = torch.tensor([0, *itertools.accumulate(sizes)]).int()
        places = torch.cat([at + begin for at, begin in zip(targets, bounds.tolist(), strict=False)])
        out = ours(
            torch.cat(ids), cu_seqlens=bounds, query_ranks=torch.cat(ranks), key_ranks=torch.cat(ranks),
            target_positions=places, token_type_ids=torch.cat(ids) % 2, **told,
        )  # fmt: skip
        logits = out.logits.view(3, 2, -1)
    else:
        mask, rows = padding_mask("left", sizes, LENGTH), torch.zeros(3, LENGTH, dtype=torch.long)
        several = [rows.masked_scatter(mask.bool(), torch.cat(each).long()) for each in (ids, ranks)]
        at = torch.stack([at + LENGTH - size for at, size in zip(targets, sizes, strict=True)])
        out = ours(
            several[0], mask, query_ranks=several[1], key_ranks=several[1], target_positions=at,
            token_type_ids=several[0] % 2, **told,
        )  # fmt: skip
        logits = out.logits
    for i, past in enumerate(pasts):
        alone = theirs(
            ids[i][None], token_type_ids=ids[i][None] % 2, use_mems=True,
            mems=list(remembered[i][:, :, None]) if past else None,
            perm_mask=(ranks[i][None, :] >= ranks[i][:, None])[None].float(),
            target_mapping=torch.nn.functional.one_hot(targets[i], sizes[i])[None].float(),
        )  # fmt: skip
        assert_near(logits[i], alone.logits[0], 1e-5)
        kept = out.mems.split()[i]
        assert not kept.requires_grad
        assert_near(kept, torch.cat(alone.mems, 1).transpose(0, 1), 1e-5, "mems")


def test_gradient_checkpointing_changes_nothing(tmp_path):
    ours = ours_of(hf_model("XLNetLMHeadModel", dropout=0.0), tmp_path).train()
    ids, (query_ranks, key_ranks, targets) = random_ids(BATCH, LENGTH), order(3)
    found = []
    for checkpoint in (False, True):
        ours.gradient_checkpointing = checkpoint
        ours.zero_grad()
        ours(
            ids, query_ranks=query_ranks, key_ranks=key_ranks, target_positions=targets, mems=memory(ours),
            labels=ids.gather(1, targets),
        ).loss.backward()  # fmt: skip
        found.append(
            {name: parameter.grad.clone() for name, parameter in ours.named_parameters() if parameter.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, 1e-6, name)


def test_compiles_without_breaks(tmp_path):
    """Dense and packed batches, with orders, targets (-1: none), segments, memory and losses."""
    ours = ours_of(hf_model("XLNetLMHeadModel", n_layer=1), tmp_path)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ids, (query_ranks, key_ranks, targets) = random_ids(BATCH, LENGTH), order(3)
    some = targets.clone()
    some[1, 2:] = -1
    told = {"query_ranks": query_ranks, "key_ranks": key_ranks, "token_type_ids": ids % 2}
    labels = ids.gather(1, targets)
    bounds = torch.tensor([0, LENGTH, LENGTH + 5, BATCH * LENGTH]).int()
    packed = {name: value.flatten() for name, value in told.items()} | {"cu_seqlens": bounds, "max_seqlen": 13}
    for given, batch in {
        "mems": (ids, told | {"mems": memory(ours)[:1], "use_mems": True}),
        "some targets": (ids, told | {"target_positions": some, "labels": labels}),
        "packed": (ids.flatten(), packed | {"target_positions": torch.tensor([2, 8, 10, 26]), "labels": labels[0]}),
    }.values():
        expected, got = ours(given, **batch, return_logits=True), compiled(given, **batch, return_logits=True)
        assert_near(got.logits, expected.logits, 1e-6)
        if "labels" in batch:
            assert_near(got.loss, expected.loss, 1e-6)
            gradients = [torch.autograd.grad(out.loss, list(ours.parameters()), allow_unused=True)
                         for out in (got, expected)]  # fmt: skip
            for a, b in zip(*gradients, strict=True):
                assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))
        for a, b in zip(got.mems or (), expected.mems or (), strict=True):
            assert_near(a, b, 1e-6)


def test_generates_as_hugging_face(tmp_path):
    theirs = hf_model("XLNetLMHeadModel", seed=3)
    with torch.no_grad():
        theirs.transformer.word_embedding.weight *= 2.0  # no two tokens tie
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(2, 6, seed=2)
    for beams in (1, 3):
        options = {"max_new_tokens": 7, "num_beams": beams, "pad_token_id": 1, "eos_token_id": 60}
        expected = theirs.generate(ids, do_sample=False, use_mems=False, **options)
        assert torch.equal(ours.generate(ids, **options), expected), f"{beams} beams"
    alone = ours.generate(ids[1:, 2:], max_new_tokens=7, eos_token_id=())
    for side in ("left", "right"):
        mask = padding_mask(side, [6, 4], 6)
        short = ids.clone()
        short[1] = torch.cat([ids[1, :2], ids[1, 2:]] if side == "left" else [ids[1, 2:], ids[1, :2]])
        together = ours.generate(short, mask, max_new_tokens=7, eos_token_id=())
        assert torch.equal(together[1, 6:], alone[0, 4:]), side


NO_ORDER = torch.tensor([[[0, 1, 0], [0, 0, 1], [1, 0, 0]]])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"perm_mask": NO_ORDER, "attention_mask": torch.tensor([[1, 1, 0]])},
            "perm_mask follows from no order",
        ),
        (
            {"perm_mask": NO_ORDER.repeat(2, 1, 1), "target_positions": torch.tensor([[0, 1], [2, -1]])},
            "a perm_mask that follows from no order needs as many targets in each row",
        ),
        (
            {"perm_mask": NO_ORDER[:, :2], "target_positions": torch.tensor([[0]])},
            r"perm_mask has shape \(1, 2, 3\); expected \(1, 3, 3\)",
        ),
        ({"query_ranks": torch.zeros(1, 3).int()}, "query_ranks and key_ranks go together"),
        ({"target_positions": torch.tensor([[7]])}, "target_positions must name at least one token, from 0 to 2"),
        ({"target_mapping": torch.ones(1, 2, 3)}, "target_mapping must have one 1 in each row"),
        ({"mems": [torch.zeros(2, 1, 32)]}, "mems has 1 tensors; expected one per layer, 3"),
        ({"mems": Memory((torch.zeros(2, 32),) * 3, (1, 1))}, "mems is of 2 sequences; the batch has 1"),
        (
            {"mems": Memory((torch.zeros(2, 32),) * 3, (3,))},
            r"mems.states\[0\] has shape \(2, 32\); expected \(3, 32\)",
        ),
        ({"mems": [torch.zeros(2, 2, 32)] * 3}, r"mems\[0\] has shape \(2, 2, 32\); expected \(length, 1, 32\)"),
        (
            {"mems": [torch.zeros(2, 1, 32)] * 3, "attention_mask": torch.tensor([[1, 1, 0]])},
            r"mems of \(length, batch, d_model\) need a batch \(batch, length\) without padding",
        ),
    ],
)
def test_bad_input_is_named(batch, message, tmp_path):
    ours = ours_of(hf_model("XLNetLMHeadModel"), tmp_path)
    rows = len(batch["perm_mask"]) if "perm_mask" in batch else 1
    with pytest.raises(ValueError, match=message):
        ours(random_ids(rows, 3), **batch)
