"""The model under torch.compile, autocast, gradient checkpointing, copies, hooks and replaced leaves; its output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import llmengine
from llmengine import Transformer, TransformerConfig
from llmengine.models import TransformerOutput
from llmengine.models.modes import evaluating
from llmengine.testing import assert_near

from .peers import VOCABULARY, gradients_as_theirs, gradients_of, hf_model, ours_of, padding_mask, random_ids

QUIET = {"dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
PRESETS = ["bert-tiny", "gpt-tiny"]
presets = pytest.mark.parametrize("preset", PRESETS)
IDS, LENGTHS = random_ids(3, 9), [9, 4, 6]


def model_of(preset: str, **fields) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.preset(preset, vocab_size=VOCABULARY, max_positions=24, **QUIET | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def batch_of(preset: str, kind: str = "full") -> dict[str, Tensor]:
    labels = torch.where(torch.arange(9) % 3 == 0, IDS, -100) if preset == "bert-tiny" else IDS
    batch = {"input_ids": IDS, "labels": labels}
    if preset == "bert-tiny":
        batch |= {"token_type_ids": IDS % 2, "next_sentence_label": torch.tensor([1, 0, 1])}
    if kind == "packed":
        batch = {k: v.flatten() for k, v in batch.items()}
        batch |= {"cu_seqlens": torch.tensor([0, 9, 13, 27]).int(), "max_seqlen": 14}
    elif kind != "full":
        batch["attention_mask"] = padding_mask(kind, LENGTHS, 9)
    return batch


def run(model: Transformer, batch: dict, call=None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = (model if call is None else call)(**batch).loss
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return loss.detach(), found


def assert_same(ours, other, tolerance: float) -> None:
    assert_near(ours[0], other[0], tolerance, "loss")
    for name in other[1]:
        assert_near(ours[1][name], other[1][name], tolerance, name)


@pytest.mark.parametrize("kind", ["full", "left", "right", "packed"])
@presets
def test_compiles_into_one_graph(preset, kind):
    model, batch = model_of(preset), batch_of(preset, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(run(model, batch, compiled), run(model, batch), 1e-5)
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if "label" not in k}
        assert_near(compiled(**inputs).logits, model(**inputs).logits, 1e-5)
        states = compiled(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == 3
        assert_near(states[-1], model(**inputs).last_hidden_state, 1e-5)


@pytest.mark.parametrize("kind", ["full", "right"])
@presets
def test_autocast_is_as_near_to_float32_as_hugging_faces(preset, kind, tmp_path):
    """Loss and gradients in bfloat16 against float32: at most twice Hugging Face's error under autocast."""
    theirs = hf_model("BertForPreTraining" if preset == "bert-tiny" else "GPT2LMHeadModel")
    ours = ours_of(theirs, tmp_path)
    batch = batch_of(preset, kind)
    if "attention_mask" in batch:
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["labels"], -100)

    def results(model, gradients, enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        return {"loss": loss.detach().float()} | gradients(model)

    exact = results(theirs, gradients_of, False)
    peer, got = results(theirs, gradients_of, True), results(ours, gradients_as_theirs, True)
    for name, value in exact.items():
        allowed = 2 * (peer[name] - value).norm() + 2**-8 * value.norm() + 1e-4
        assert (got[name] - value).norm() <= allowed, name


@presets
def test_bfloat16_weights(preset):
    """All in bfloat16: finite, and near float32."""
    exact, rough = model_of(preset), model_of(preset).bfloat16()
    batch = batch_of(preset, "right")
    assert_near(rough(**batch).loss.float(), exact(**batch).loss, 0.05)
    run(rough, batch)
    assert all(
        p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in rough.parameters() if p.grad is not None
    )


@presets
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_nothing(preset, dropout):
    model = model_of(preset, dropout=dropout, attention_dropout=dropout, embed_dropout=dropout)
    batch = batch_of(preset, "right")
    torch.manual_seed(3)
    expected = run(model, batch)
    model.gradient_checkpointing = True
    calls = []
    model.stack.layers[0].register_forward_pre_hook(lambda *_: calls.append(0))
    torch.manual_seed(3)
    assert_same(run(model, batch), expected, 1e-6)
    assert len(calls) == 2, "a checkpointed layer runs again in the backward"


@presets
def test_dropout_is_random_in_training_and_off_in_eval(preset):
    model = model_of(preset, dropout=0.3, attention_dropout=0.3, embed_dropout=0.3)
    batch = batch_of(preset)
    torch.manual_seed(1)
    first, second = model(**batch).loss, model(**batch).loss
    torch.manual_seed(1)
    assert torch.equal(model(**batch).loss, first) and not torch.equal(first, second)
    quiet = model_of(preset).eval()
    quiet.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(**batch).loss, quiet(**batch).loss)


def test_what_rests_for_a_while_is_left_as_it_was():
    """A part that someone froze in eval() does not begin to drop out because the model generated or was measured."""
    model = model_of("gpt-tiny", dropout=0.3)
    frozen = model.stack.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model) as device:
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    model.generate(IDS.to(device), max_new_tokens=2)
    with pytest.raises(ValueError, match="max_seqlen belongs to cu_seqlens"), evaluating(model):
        model(IDS, max_seqlen=9)
    assert [module.training for module in model.modules()] == modes
    assert model.training and not any(module.training for module in frozen.modules())


@presets
def test_a_copy_is_equal_and_apart(preset):
    model, batch = model_of(preset), batch_of(preset)
    twin = copy.deepcopy(model)
    assert_same(run(twin, batch), run(model, batch), 0.0)
    with torch.no_grad():
        twin.words.weight.normal_()
    assert not torch.equal(twin(**batch).loss, model(**batch).loss)


@presets
def test_a_state_dict_is_tensors_without_repeats(preset):
    model = model_of(preset)
    state = model.state_dict()
    assert all(type(tensor) is Tensor for tensor in state.values())
    places = [tensor.untyped_storage()._cdata for tensor in state.values()]
    assert len(set(places)) == len(places), "tied weights appear once"
    fresh = Transformer(model.config).train()
    assert fresh.load_state_dict(state, strict=True).missing_keys == []
    assert torch.equal(fresh(**batch_of(preset)).loss, model(**batch_of(preset)).loss)


# ---- leaves that someone replaced or watches -------------------------------------------------------------------------


class Adapter(torch.nn.Module):
    """A low-rank adapter as libraries write them: the old leaf inside, and something added."""

    def __init__(self, leaf: torch.nn.Linear) -> None:
        super().__init__()
        self.leaf = leaf
        self.down = torch.nn.Linear(leaf.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, leaf.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.leaf(x) + self.up(self.down(x))


def test_explain_tells_what_is_fused():
    model = model_of("gpt-tiny")
    assert model.explain().splitlines() == [
        "decoder.layers.0-1.attention_norm: fused",
        "decoder.layers.0-1.feed_forward_norm: fused",
        "decoder.layers.0-1.feed_forward: fused",
        "decoder.final_norm: fused",
    ]
    assert "encoder.embeddings.norm: fused" in model_of("bert-tiny").explain()
    layer = model.stack.layers[1]
    layer.feed_forward.up = Adapter(layer.feed_forward.up)
    layer.attention_norm.register_forward_hook(lambda *_: None)
    model.stack.final_norm.forward = lambda x: x
    assert model.explain().splitlines() == [
        "decoder.layers.0.attention_norm: fused",
        "decoder.layers.0.feed_forward_norm: fused",
        "decoder.layers.0.feed_forward: fused",
        "decoder.layers.1.attention_norm: leaf by leaf (norm has hooks)",
        "decoder.layers.1.feed_forward_norm: fused",
        "decoder.layers.1.feed_forward: leaf by leaf (up is a Adapter)",
        "decoder.final_norm: leaf by leaf (norm's forward was replaced)",
    ]


def test_explain_of_the_package_tells_the_backends():
    text = llmengine.explain(model_of("bert-tiny").eval(), IDS)
    assert "norm_forward: cpu" in text and "attention_forward: " in text and "ffn_forward: " in text


@pytest.mark.parametrize(
    "place",
    ["feed_forward.up", "feed_forward.down", "attention.qkv", "attention.out", "attention_norm", "feed_forward_norm"],
)
@presets
def test_hooks_see_every_leaf_and_change_nothing(preset, place):
    model, batch = model_of(preset), batch_of(preset, "right")
    expected = run(model, batch)
    seen = []
    leaf = model.stack.get_submodule(f"layers.1.{place}")
    leaf.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    leaf.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0].shape[0]))
    assert_same(run(model, batch), expected, 1e-5)
    assert seen == [sum(LENGTHS)] * 2, "no padding inside"


@presets
def test_adapters_train(preset):
    """Replaced leaves take part, forwards and backwards; the frozen rest gets no gradients."""
    model = model_of(preset).requires_grad_(False)
    batch = batch_of(preset)
    before = model(**batch).loss
    adapters = []
    for layer in model.stack.layers:
        for module, name in ((layer.attention, "qkv"), (layer.feed_forward, "up"), (layer.feed_forward, "down")):
            adapters.append(Adapter(getattr(module, name)))
            setattr(module, name, adapters[-1])
    loss = model(**batch).loss
    assert not torch.equal(loss, before)
    loss.backward()
    assert all(a.up.weight.grad.any() and a.down.weight.grad.any() for a in adapters)
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


# ---- the output ------------------------------------------------------------------------------------------------------


def test_an_output_answers_by_attribute_key_and_index():
    out = model_of("bert-tiny")(**batch_of("bert-tiny"))
    assert isinstance(out, TransformerOutput)
    assert out.keys() == list(out) == ["loss", "prediction_logits", "seq_relationship_logits"]
    assert out[0] is out.loss is out["loss"] and out[1] is out.logits is out.prediction_logits is out["logits"]
    assert [type(v) for v in out.to_tuple()] == [Tensor] * 3 and len(out) == 3
    assert dict(out.items()).keys() == set(out.keys()) and all(
        a is b for a, b in zip(out[1:], out.values()[1:], strict=True)
    )
    assert set(out.losses) == {"mlm", "nsp"} and out.hidden_states is None
    assert "loss" in out and "logits" in out and "hidden_states" not in out and 3 not in out
    assert repr(out) == "TransformerOutput(loss, prediction_logits, seq_relationship_logits)"
    with pytest.raises(KeyError, match="attentions"):
        out["attentions"]
    with pytest.raises(AttributeError, match="TransformerOutput has no attentions; fields: loss, losses, logits"):
        out.attentions  # noqa: B018
    with pytest.raises(IndexError):
        out[3]


def test_logits_beside_labels_are_computed_when_asked_for():
    model, batch = model_of("gpt-tiny"), batch_of("gpt-tiny", "right")
    calls = []
    model.token_head.register_forward_hook(lambda *_: calls.append(1))
    out = model(**batch)
    assert not calls
    logits = out.logits
    assert calls == [1] and out.logits is logits and logits.requires_grad
    model(**batch, return_logits=True)
    assert calls == [1, 1]
    without = model(batch["input_ids"], return_logits=False)
    assert calls == [1, 1] and without.loss is None and without.logits is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        later = model(**batch)
    assert later.logits.dtype == torch.bfloat16 and not later.logits.requires_grad


def test_a_backbone_returns_hidden_states():
    model = model_of("bert-tiny", objectives=[])
    out = model(IDS)
    assert out.keys() == ["last_hidden_state", "pooler_output"] and out[0] is out.last_hidden_state
    assert out.logits is None and out.loss is None and out.losses == {}


def test_wrappers_find_the_tensors_of_an_output():
    out = model_of("gpt-tiny")(**batch_of("gpt-tiny"))
    doubled = _pytree.tree_map(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, out)
    assert isinstance(doubled, TransformerOutput) and torch.equal(doubled.loss, out.loss * 2)
