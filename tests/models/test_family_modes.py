"""Every kind of model, by preset: packed equals padded, compiled, checkpointed, cached, in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmengine import Transformer, TransformerConfig
from llmengine.testing import assert_near

from .peers import VOCABULARY, padding_mask, random_ids

QUIET = {
    "dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0,
}  # fmt: skip
GPT = {"preset": "gpt-tiny", "family": "custom"}
MODELS = {
    "modernbert": {"preset": "modernbert-tiny", "window": 3},
    "albert": {"preset": "bert-tiny", "family": "custom", "share_layers": True, "d_embed": 16},
    "llama": {"preset": "llama-tiny"},
    "gemma": {
        **GPT, "positions": "rotary", "norm": "rms_offset", "norm_place": "sandwich", "qk_norm": True, "gated": True,
        "attention_softcap": 5.0, "logit_softcap": 3.0, "embed_scale": True, "window": 4,
        "layer_types": ["window", "full"], "scale_residual_init": False,
    },
    "neox": {**GPT, "positions": "rotary", "rotary": {"fraction": 0.5}, "norm_place": "parallel"},
    "alibi": {**GPT, "positions": "alibi"},
    "bart": {"preset": "bart-tiny", "pad_token_id": 1},
    "transformer": {"preset": "transformer-tiny"},
    "t5": {"preset": "t5-tiny", "position_buckets": 8, "position_bucket_distance": 9},
}  # fmt: skip
models = pytest.mark.parametrize("name", MODELS)
LENGTHS, LENGTH = [9, 4, 6], 9
TARGETS, TARGET = [5, 7, 2], 7


def model_of(name: str, **fields) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "d_ff": 48}
    fields = MODELS[name] | shape | QUIET | fields
    if fields["preset"] not in ("t5-tiny",):
        fields["max_positions"] = 24
    model = Transformer(TransformerConfig.from_dict(fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def batch_of(model: Transformer, kind: str) -> dict[str, Tensor]:
    """Three sequences: padded on a side, or packed; every token of a decoder labelled, a third of an encoder's."""
    config = model.config
    mask, target_mask = padding_mask("right", LENGTHS, LENGTH), padding_mask("right", TARGETS, TARGET)
    ids, targets = random_ids(3, LENGTH), random_ids(3, TARGET, seed=1)
    labels = torch.where(torch.arange(LENGTH) % 3 == 0, ids, -100) if config.architecture == "encoder" else ids
    if kind == "left":
        mask = mask.flip(1)
        ids, labels = ids.roll(0, 1), labels  # columns differ from those on the right: see the caller
        shift = [(LENGTH - n) for n in LENGTHS]
        ids, labels = (torch.stack([row.roll(s) for row, s in zip(x, shift, strict=True)]) for x in (ids, labels))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, labels, -100)}
    if config.architecture == "encoder_decoder":
        batch |= {
            "decoder_input_ids": targets, "decoder_attention_mask": target_mask,
            "labels": torch.where(target_mask == 1, targets, -100),
        }  # fmt: skip
    if kind != "packed":
        return batch
    real, target_real = mask.bool(), target_mask.bool()
    packed = {"input_ids": ids[real], "cu_seqlens": boundaries(LENGTHS), "labels": batch["labels"]}
    if config.architecture == "encoder_decoder":
        packed |= {"decoder_input_ids": targets[target_real], "decoder_cu_seqlens": boundaries(TARGETS)}
        packed["labels"] = targets[target_real]
    else:
        packed["labels"] = batch["labels"][real]
    return packed


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(model: Transformer, batch: dict, call=None) -> dict[str, Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = (model if call is None else call)(**batch).loss
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **found}


def assert_same(ours: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    for name, value in other.items():
        assert_near(ours[name], value, tolerance, name)


@models
def test_layouts_agree(name):
    """Padded on the right, on the left where positions do not count columns, and packed."""
    model = model_of(name)
    expected = run(model, batch_of(model, "right"))
    assert_same(run(model, batch_of(model, "packed")), expected, 1e-5)
    if model.config.positions not in ("learned", "sinusoid"):
        assert_same(run(model, batch_of(model, "left")), expected, 1e-5)


@models
def test_gradient_checkpointing_changes_nothing(name):
    model = model_of(name)
    batch = batch_of(model, "right")
    expected = run(model, batch)
    model.gradient_checkpointing = True
    assert_same(run(model, batch), expected, 1e-6)


@pytest.mark.parametrize("kind", ["right", "packed"])
@pytest.mark.parametrize("name", ["modernbert", "gemma", "bart", "t5"])
def test_compiles_into_one_graph(name, kind):
    model = model_of(name)
    batch = batch_of(model, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(run(model, batch, compiled), run(model, batch), 1e-5)


@models
def test_holes_in_a_mask_keep_distances(name):
    """Padding between tokens: they keep the distances that they have in the batch."""
    model = model_of(name).eval()
    if model.config.architecture == "encoder_decoder":
        return_of = {"decoder_input_ids": random_ids(1, 5, seed=3)}
    else:
        return_of = {}
    ids, mask = random_ids(1, LENGTH), torch.ones(1, LENGTH, dtype=torch.int64)
    mask[0, 3:5] = 0
    other = ids.clone()
    other[0, 3:5] = 7  # what stands in a hole does not matter
    first = model(ids, mask, **return_of)
    assert_near(model(other, mask, **return_of).logits, first.logits, 1e-6)
    if model.config.counts_distances and not return_of:
        closed = torch.cat([ids[:, :3], ids[:, 5:]], 1)
        moved = model(closed).logits[0, -1]
        assert (moved - first.logits[0, -1]).abs().max() > 1e-4, "the hole was closed"


@pytest.mark.parametrize("name", ["llama", "gemma", "neox", "alibi", "bart", "transformer", "t5"])
def test_cached_generation_equals_recomputation(name):
    model = model_of(name).eval()
    with torch.no_grad():
        model.words.weight *= 2.0
    ids = random_ids(2, 6)
    if model.encoder is None:
        out = model.generate(ids, max_new_tokens=8, eos_token_id=())
        for column in range(6, out.shape[1]):
            assert torch.equal(model(out[:, :column]).logits[:, -1].argmax(-1), out[:, column])
        return
    prompt = random_ids(2, 3, seed=5)
    out = model.generate(ids, max_new_tokens=8, decoder_input_ids=prompt, eos_token_id=())
    for column in range(3, out.shape[1]):
        logits = model(ids, decoder_input_ids=out[:, :column]).logits
        assert torch.equal(logits[:, -1].argmax(-1), out[:, column])


@models
def test_bfloat16_is_near_float32(name):
    exact, rough = model_of(name), model_of(name).bfloat16()
    batch = batch_of(exact, "right")
    assert_near(run(rough, batch)["loss"].float(), run(exact, batch)["loss"], 0.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in rough.parameters())


def test_layer_dropout_skips_layers():
    model = model_of("bart", layer_dropout=0.5)
    batch = batch_of(model, "right")
    torch.manual_seed(1)
    losses = {round(float(model(**batch).loss.detach()), 5) for _ in range(12)}
    assert len(losses) > 3
    model.eval()
    assert len({float(model(**batch).loss.detach()) for _ in range(3)}) == 1


def test_sampling_rules():
    model = model_of("llama").eval()
    ids = random_ids(2, 4)
    options = {"max_new_tokens": 6, "eos_token_id": VOCABULARY - 1}
    several = model.generate(ids, do_sample=True, num_return_sequences=3, seed=1, temperature=2.0, **options)
    assert several.shape[0] == 6 and torch.equal(several[:, :4], ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in several[:3]}) > 1
    certain = model.generate(ids, do_sample=True, min_p=1.0, seed=2, **options)
    assert torch.equal(certain, model.generate(ids, **options))
    apart = model.generate(ids, no_repeat_ngram_size=1, **options)
    assert all(len(set(row.tolist())) == len(row) or len(set(ids[i].tolist())) < 4 for i, row in enumerate(apart))
    never = model.generate(ids, logits_processor=[lambda so_far, s: s.index_fill(1, torch.tensor([5]), 1e9)], **options)
    assert (never[:, 4:] == 5).all()
    short = model.generate(ids, stopping_criteria=[lambda so_far, s: so_far.shape[1] >= 6], **options)
    assert short.shape[1] == 6
    with pytest.raises(ValueError, match=r"min_p is 1.5; it must be in"):
        model.generate(ids, do_sample=True, min_p=1.5)
    with pytest.raises(ValueError, match="num_return_sequences 2 needs do_sample=True or as many num_beams"):
        model.generate(ids, num_return_sequences=2)


class Logits(torch.nn.Module):
    """Tensors in, one tensor out, as torch.export wants it."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        target = {"decoder_input_ids": input_ids} if self.model.config.architecture == "encoder_decoder" else {}
        return self.model(input_ids, **target).logits


@pytest.mark.parametrize("name", ["modernbert", "gemma", "bart", "t5"])
def test_exports(name):
    module, ids = Logits(model_of(name).eval()), random_ids(2, 7)
    program = torch.export.export(module, (ids,))
    other = random_ids(2, 7, seed=1)
    assert_near(program.module()(other), module(other), 1e-5)


@models
def test_initialised_after_meta(name):
    """Made on meta, given memory, initialised: the weights of a model that is initialised where it is made."""
    config = model_of(name).config
    with torch.device("meta"):
        late = Transformer(config)
    assert all(parameter.is_meta for parameter in late.parameters())
    late.to_empty(device="cpu")
    early = Transformer(config)
    for model in (late, early):
        torch.manual_seed(3)
        model.reset_parameters()
    for (key, a), (_, b) in zip(late.named_parameters(), early.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    ids = random_ids(1, 5)
    assert torch.equal(Logits(late.eval())(ids), Logits(early.eval())(ids))


@pytest.mark.parametrize("start", [2, None])
def test_a_packed_decoder_reads_its_labels(start):
    """Without decoder_input_ids, packed labels are shifted sequence by sequence, as padded ones are."""
    model = model_of("bart", decoder_start_token_id=start)
    packed, padded = batch_of(model, "packed"), batch_of(model, "right")
    targets = padded.pop("decoder_input_ids")
    mask = padded["decoder_attention_mask"]
    padded["labels"] = torch.where(mask == 1, targets, -100)
    del packed["decoder_input_ids"]
    assert_same(run(model, packed), run(model, padded), 1e-5)
    for wrong, message in (([0, 5, 99], "decoder_cu_seqlens must rise from 0 to the number of tokens"),
                           ([0, 14], "3 sequences for the encoder but 1 for the decoder")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(**packed | {"decoder_cu_seqlens": torch.tensor(wrong).int()})
    with pytest.raises(ValueError, match=r"or labels \(tokens,\) with decoder_cu_seqlens"):
        model(**{name: value for name, value in packed.items() if name != "decoder_cu_seqlens"})
