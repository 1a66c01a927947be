"""One batch in several shapes (padded on either side, packed), and one step in several micro-batches: equal results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmengine import Transformer, TransformerConfig
from llmengine.testing import assert_near

from .peers import VOCABULARY, padding_mask, random_ids

LENGTHS = [7, 1, 12, 4]
LONGEST = max(LENGTHS)
SHAPE = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "max_positions": 24}
MODELS = {
    "bert": {"preset": "bert-tiny"},
    "mlm": {"preset": "bert-tiny", "objectives": ["mlm"], "pooler": "none"},
    "gpt2": {"preset": "gpt-tiny"},
    "pre-LN encoder": {"architecture": "encoder", "objectives": ["mlm"], "tie_embeddings": False, "head_bias": True},
    "post-LN decoder": {"architecture": "decoder", "objectives": ["clm"], "norm_place": "post", "final_norm": False},
}
models = pytest.mark.parametrize("name", MODELS)


def model_of(name: str, **fields) -> Transformer:
    """In training mode without dropout, float64, weights away from their initial zeros and ones."""
    torch.manual_seed(0)
    quiet = {"dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
    model = Transformer(TransformerConfig.from_dict(SHAPE | quiet | MODELS[name] | fields), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def sequences(config: TransformerConfig) -> dict[str, list[Tensor] | Tensor]:
    """Ragged sequences with labels for the model's heads."""
    ids = [random_ids(n, seed=i) for i, n in enumerate(LENGTHS)]
    kept = torch.Generator().manual_seed(0)
    labels = [torch.where(torch.rand(len(x), generator=kept) < 0.5, x, -100) for x in ids]
    parts = {"input_ids": ids, "labels": ids if config.causal else labels}
    if config.type_vocab_size:
        parts["token_type_ids"] = [x % 2 for x in ids]
    return parts


def pairs(config: TransformerConfig, rows=slice(None)) -> dict[str, Tensor]:
    labels = torch.tensor([0, 1, 1, -100])
    return {"next_sentence_label": labels[rows]} if "nsp" in config.objectives else {}


def packed(parts: dict, rows: list[int]) -> dict:
    lengths = torch.tensor([0, *(LENGTHS[row] for row in rows)])
    batch = {name: torch.cat([values[row] for row in rows]) for name, values in parts.items()}
    return batch | {"cu_seqlens": lengths.cumsum(0).int(), "max_seqlen": int(lengths.max())}


def padded(parts: dict, side: str) -> dict:
    """Padding holds tokens and labels that must not matter, and positions that count from a sequence's beginning."""
    mask = padding_mask(side, LENGTHS, LONGEST)
    batch = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    for name, values in parts.items():
        full = torch.full((len(LENGTHS), LONGEST), 1)
        full[mask == 1] = torch.cat(values)
        batch[name] = full
    return batch


def losses_and_gradients(model: Transformer, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {k: v.detach() for k, v in out.losses.items()} | {"loss": out.loss.detach()}, found


def assert_equal(ours, other, tolerance=1e-11):
    for a, b in zip(ours, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_near(a[name], b[name], tolerance, name)


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(name, side):
    model = model_of(name)
    parts, rows = sequences(model.config), list(range(len(LENGTHS)))
    whole = packed(parts, rows) | pairs(model.config)
    ragged = padded(parts, side) | pairs(model.config)
    assert_equal(losses_and_gradients(model, ragged), losses_and_gradients(model, whole))
    real = ragged["attention_mask"] == 1
    outputs = [model(**batch, output_hidden_states=True) for batch in (ragged, whole)]
    assert_near(outputs[0].logits[real], outputs[1].logits, 1e-11, "logits")
    assert_near(outputs[0].last_hidden_state[real], outputs[1].last_hidden_state, 1e-11, "last_hidden_state")
    assert (outputs[0].logits[~real] == 0).all() and (outputs[0].last_hidden_state[~real] == 0).all()
    for state, other in zip(*(out.hidden_states for out in outputs), strict=True):
        assert_near(state[real], other, 1e-11, "hidden_states")
    if model.pooler is not None:
        assert_near(outputs[0].pooler_output, outputs[1].pooler_output, 1e-11, "pooler_output")
        assert_near(outputs[0].seq_relationship_logits, outputs[1].seq_relationship_logits, 1e-11)


@models
def test_holes_in_the_mask_do_not_matter(name):
    """Padding in the middle of a row is taken out as well."""
    model = model_of(name)
    ids = random_ids(2, 9)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0, 1]])
    out = model(ids, attention_mask=mask)
    for row in range(2):
        real = mask[row] == 1
        alone = model(ids[row, real][None], position_ids=torch.arange(9)[real][None])
        assert_near(out.logits[row, real], alone.logits[0], 1e-11)


@models
def test_sequences_of_a_packed_batch_do_not_see_each_other(name):
    model = model_of(name)
    parts = sequences(model.config)
    together = model(**packed(parts, [0, 2, 3]), return_logits=True)
    assert together.logits.shape == (23, VOCABULARY)
    for row, place in ((0, slice(0, 7)), (2, slice(7, 19)), (3, slice(19, 23))):
        alone = model(**packed(parts, [row]), return_logits=True)
        assert_near(together.logits[place], alone.logits, 1e-11)


@models
def test_shapes_of_a_packed_batch(name):
    """(tokens,) and (1, tokens), with max_seqlen or without."""
    model = model_of(name)
    batch = packed(sequences(model.config), [0, 1, 2, 3]) | pairs(model.config)
    expected = losses_and_gradients(model, batch)
    flat = {k: v[None] if v.shape == batch["input_ids"].shape else v for k, v in batch.items() if k != "max_seqlen"}
    assert_equal(losses_and_gradients(model, flat), expected)
    assert model(**flat).logits.shape == (1, sum(LENGTHS), VOCABULARY)


def test_a_full_mask_is_no_mask():
    model = model_of("gpt2")
    ids = random_ids(3, 8)
    for mask in (torch.ones(3, 8), torch.ones(3, 8).bool(), torch.ones(3, 8).long()):
        assert torch.equal(model(ids, attention_mask=mask).logits, model(ids).logits)


@models
@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_micro_batches_add_up_to_one_batch(name, side):
    """With num_items_in_batch of the whole step, whatever the split: the same losses and gradients."""
    model = model_of(name)
    parts = sequences(model.config)
    tokens = sum(int((x[model.config.causal :] != -100).sum()) for x in parts["labels"])
    batch = packed(parts, [0, 1, 2, 3]) | pairs(model.config)
    expected = losses_and_gradients(model, batch)
    for items in ({"tokens": tokens, "sequences": 3}, {"tokens": torch.tensor(tokens), "sequences": torch.tensor(3)}):
        assert_equal(losses_and_gradients(model, batch | {"num_items_in_batch": items}), expected)
        for split in ([[0], [1], [2], [3]], [[2, 0], [3, 1]], [[0, 1, 2], [3]]):
            model.zero_grad()
            total = 0.0
            for rows in split:
                whole = padded(parts, side) if side != "packed" else None
                part = packed(parts, rows) if whole is None else {k: v[rows] for k, v in whole.items()}
                out = model(**part, **pairs(model.config, rows), num_items_in_batch=items)
                out.loss.backward()
                total += out.loss.item()
            found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
            assert total == pytest.approx(expected[0]["loss"].item(), rel=1e-11)
            assert_equal([found], expected[1:])


def test_one_number_serves_one_kind_of_label():
    model = model_of("bert")
    ids, pair = random_ids(2, 5), torch.tensor([0, 1])
    assert model(ids, labels=ids, num_items_in_batch=5).loss == 2 * model(ids, labels=ids).loss
    one = model(ids, next_sentence_label=pair, num_items_in_batch=4).loss
    assert_near(one, model(ids, next_sentence_label=pair).loss / 2, 1e-12)
    with pytest.raises(ValueError, match=r"num_items_in_batch must be a dict .*\['mlm', 'nsp'\]"):
        model(ids, labels=ids, next_sentence_label=pair, num_items_in_batch=4)
    with pytest.raises(ValueError, match=r"num_items_in_batch lacks \['sequences'\]"):
        model(ids, labels=ids, next_sentence_label=pair, num_items_in_batch={"tokens": 4})


@models
def test_no_labels_give_zero(name):
    model = model_of(name)
    ids = random_ids(2, 5)
    out = model(ids, labels=torch.full_like(ids, -100))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_an_ignored_last_token_of_a_causal_batch():
    """The last token has no successor: whatever its label, the loss is that of the tokens before it."""
    model = model_of("gpt2")
    ids = random_ids(2, 5)
    labels = ids.clone()
    labels[:, 0] = -100  # nothing predicts the first token
    assert_near(model(ids, labels=labels).loss, model(ids, labels=ids).loss, 0.0)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    assert_near(model(ids, labels=ids).loss, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()), 1e-12)


IDS = random_ids(2, 5)
BAD = [
    ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a torch.Tensor, got list"),
    ({"input_ids": IDS.float()}, ValueError, "input_ids has dtype torch.float32; allowed: int64, int32"),
    ({"input_ids": IDS[0]}, ValueError, r"input_ids has shape \(5,\); expected \(batch, length\)"),
    ({"input_ids": IDS[:, :0]}, ValueError, r"input_ids is empty, shape \(2, 0\)"),
    ({"input_ids": IDS + 60}, ValueError, r"input_ids holds \d+; allowed: 0 to 60 \(vocab_size 61\)"),
    ({"input_ids": IDS - 60}, ValueError, "input_ids holds -"),
    ({"input_ids": random_ids(2, 25)}, ValueError, "input_ids has a sequence of 25 tokens; max_positions is 24"),
    ({"attention_mask": torch.ones(2, 4)}, ValueError, r"attention_mask is \(2, 4\); expected \(2, 5\)"),
    ({"attention_mask": torch.full((2, 5), 2)}, ValueError, "attention_mask must hold 0 .* and 1 only, got 2"),
    (
        {"attention_mask": torch.eye(2, 5) * torch.tensor([[1], [0]])},
        ValueError,
        "attention_mask has no token in row 1",
    ),
    ({"token_type_ids": IDS[:1]}, ValueError, r"token_type_ids has shape \(1, 5\); expected .*\(2, 5\)"),
    ({"token_type_ids": torch.full_like(IDS, 2)}, ValueError, "token_type_ids holds 2; allowed: 0 to 1"),
    ({"position_ids": torch.full_like(IDS, 24)}, ValueError, "position_ids holds 24; allowed: 0 to 23"),
    ({"labels": torch.full_like(IDS, 61)}, ValueError, "labels holds 61; allowed: 0 to 60 .*, or -100 for no loss"),
    ({"labels": torch.full_like(IDS, -1)}, ValueError, "labels holds -1; allowed"),
    ({"labels": IDS.float()}, ValueError, "labels has dtype torch.float32"),
    ({"next_sentence_label": torch.tensor([0, 2])}, ValueError, "next_sentence_label holds 2; allowed: 0 to 1"),
    ({"next_sentence_label": torch.tensor([0])}, ValueError, r"next_sentence_label has shape \(1,\); expected \(2,\)"),
    ({"max_seqlen": 5}, ValueError, "max_seqlen belongs to cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0, 10]).int()}, ValueError, r"input_ids has shape \(2, 5\); with cu_seqlens"),
]
PACKED = [
    ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens must be an int32 tensor .*, got torch.int64 \(2,\)"),
    ({"cu_seqlens": [0, 5]}, "cu_seqlens must be an int32 tensor .*, got <class 'list'>"),
    ({"cu_seqlens": torch.tensor([0]).int()}, "cu_seqlens holds no sequence"),
    ({"cu_seqlens": torch.tensor([1, 5]).int()}, r"cu_seqlens must rise from 0 .* \(5\); it starts at 1"),
    ({"cu_seqlens": torch.tensor([0, 4]).int()}, "ends at 4"),
    ({"cu_seqlens": torch.tensor([0, 3, 3, 5]).int()}, "its smallest step is 0"),
    ({"cu_seqlens": torch.tensor([0, 2, 5]).int(), "max_seqlen": 2}, "max_seqlen is 2, but .* a sequence of 3"),
    ({"cu_seqlens": torch.tensor([0, 5]).int(), "attention_mask": IDS[0]}, "attention_mask or cu_seqlens, not both"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=lambda value: str(value) if type(value) is str else ""
)
def test_bad_batches_are_named(change, error, message):
    with pytest.raises(error, match=f"Transformer: .*{message}"):
        model_of("bert")(**{"input_ids": IDS} | change)


@pytest.mark.parametrize(("change", "message"), PACKED, ids=lambda value: str(value) if type(value) is str else "")
def test_bad_packed_batches_are_named(change, message):
    with pytest.raises(ValueError, match=f"Transformer: .*{message}"):
        model_of("bert")(**{"input_ids": IDS[0]} | change)


def test_labels_without_their_head_are_refused():
    with pytest.raises(ValueError, match=r"labels given, but objectives \[\] have no token head"):
        model_of("pre-LN encoder", objectives=[], tie_embeddings=True, head_bias=False)(IDS, labels=IDS)
    with pytest.raises(ValueError, match=r"next_sentence_label given, but objectives .* lack 'nsp'"):
        model_of("mlm")(IDS, next_sentence_label=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="token_type_ids given, but this model has no token types"):
        model_of("gpt2")(IDS, token_type_ids=IDS)
