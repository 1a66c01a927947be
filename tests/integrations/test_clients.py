"""What users do with models: load, save, copy, compile, checkpoint, adapt, and train them with Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from llmengine import functional
from llmengine.integrations.transformers import accelerate, explain, register, restore

from .families import FAMILIES, VOCABULARY, batch, build, run
from .test_families import assert_same


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_loads_by_name_and_saves_what_it_was(family, tmp_path):
    """A saved accelerated model is the model that Transformers saves; it loads on any attention."""
    model, inputs = build(family), batch(family, "right")
    expected = run(model, inputs)
    model.save_pretrained(tmp_path / "plain")
    accelerate(model).save_pretrained(tmp_path / "accelerated")
    files = {name: (tmp_path / name / "config.json").read_text() for name in ("plain", "accelerated")}
    assert files["plain"] == files["accelerated"] and "llmengine" not in files["plain"]
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in files}
    assert weights["plain"] == weights["accelerated"]

    register()
    kind = getattr(transformers, FAMILIES[family][0])
    for implementation in ("llmengine", "eager"):
        loaded = kind.from_pretrained(tmp_path / "accelerated", attn_implementation=implementation).train()
        assert loaded.config._attn_implementation == implementation
        assert_same(run(loaded, inputs), expected)
    assert_same(run(accelerate(loaded), inputs), expected)


def test_accelerating_twice_is_once():
    model = accelerate(build("bert"))
    before = explain(model)
    assert explain(accelerate(model)) == before
    assert explain(restore(restore(model))) == "this model is as Transformers made it"
    assert model.config._attn_implementation == "eager"


def test_copies_are_their_own():
    """A copy computes with its own weights, not with those of the model that it is a copy of."""
    model, inputs = accelerate(build("gpt2")), batch("gpt2")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    expected = build("gpt2")
    expected.load_state_dict(twin.state_dict())
    assert_same(run(twin, inputs), run(expected, inputs))
    assert_same(run(model, inputs), run(build("gpt2"), inputs))
    assert type(restore(twin)) is transformers.GPT2LMHeadModel and explain(model) != explain(twin)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_trainer(family, tmp_path):
    """Two steps of Trainer, accumulating, with its own mixed lengths; the weights end where eager's end."""
    rows = batch(family, "right", rows=4)
    data = [{name: column[i] for name, column in rows.items()} for i in range(4)]

    def trained(model):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            optim="sgd", learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        return model, [e["loss"] for e in trainer.state.log_history if "loss" in e] + [trainer.evaluate()["eval_loss"]]

    expected, their_losses = trained(build(family))
    model, losses = trained(accelerate(build(family)))
    assert len(losses) == 3 and losses == pytest.approx(their_losses, rel=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llama"])
def test_compiles_whole(family):
    """One graph, our operators in it; the logits are then computed, as the compiler sees no stand-in for them."""
    model, inputs = build(family), batch(family)
    expected = run(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(accelerate(model), backend="aot_eager", fullgraph=True)
    output = compiled(**inputs)
    model.zero_grad()
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same((output.loss.detach(), output.logits.detach()[inputs["labels"] != -100], gradients), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "bart", "t5", "gemma2"])
def test_gradient_checkpointing(family, reentrant):
    model, inputs = build(family), batch(family, "right")
    expected = run(model, inputs)
    accelerate(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(run(model, inputs), expected)


def test_data_parallel_over_one_process(tmp_path):
    model, inputs = build("bert"), batch("bert")
    expected = run(model, inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(accelerate(model), find_unused_parameters=True)
        wrapped(**inputs).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[2][name] * 2, rtol=1e-5, atol=1e-5)


class LowRank(torch.nn.Module):
    """What an adapter library puts in the place of a linear layer."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(0.1 * torch.randn(2, base.in_features))
        self.b = torch.nn.Parameter(0.1 * torch.randn(base.out_features, 2))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


LEAVES = {
    "bert": ("bert.encoder.layer.0", ("intermediate.dense", "output.dense")),
    "bart": ("model.decoder.layers.1", ("fc1", "fc2")),
    "llama": ("model.layers.0.mlp", ("gate_proj", "down_proj")),
    "t5": ("encoder.block.0.layer.1.DenseReluDense", ("wi", "wo")),
}


@pytest.mark.parametrize("family", LEAVES)
def test_adapters_put_in_afterwards_are_called(family):
    where, leaves = LEAVES[family]

    def adapted(model):
        torch.manual_seed(3)
        for leaf in leaves:
            parent, _, name = f"{where}.{leaf}".rpartition(".")
            setattr(model.get_submodule(parent), name, LowRank(model.get_submodule(f"{where}.{leaf}")))
        return model

    expected = run(adapted(build(family)), batch(family))
    got = run(adapted(accelerate(build(family))), batch(family))
    assert_same(got, expected)
    assert all(gradient.abs().max() > 0 for name, gradient in got[2].items() if name.endswith((".a", ".b")))
    assert "is a LowRank" in explain(accelerate(adapted(build(family))))


@pytest.mark.parametrize("family", LEAVES)
def test_hooks_put_in_afterwards_run(family):
    model, seen = accelerate(build(family)), []
    where, leaves = LEAVES[family]
    for leaf in leaves:
        model.get_submodule(f"{where}.{leaf}").register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same(run(model, batch(family)), run(build(family), batch(family)))
    assert len(seen) == len(leaves)


def test_dropout_in_training(monkeypatch):
    """Rates reach the operators in training and are off in evaluation; the mean over draws is the undropped output."""
    fields = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    model, rates = accelerate(build("bert", **fields)), {}
    for name in ("add_layer_norm", "scaled_dot_product_attention"):
        operator = getattr(functional, name)

        def spy(*args, operator=operator, name=name, **kwargs):
            rates.setdefault(name, set()).add(kwargs.get("dropout_p", args[4] if len(args) > 4 else None))
            return operator(*args, **kwargs)

        monkeypatch.setattr(functional, name, spy)
    inputs = batch("bert")
    assert model(**inputs).loss != model(**inputs).loss
    assert rates == {"add_layer_norm": {0.2}, "scaled_dot_product_attention": {0.3}}
    rates.clear()
    assert model.eval()(**inputs).loss == model(**inputs).loss
    assert rates == {"add_layer_norm": {0.0}, "scaled_dot_product_attention": {0.0}}


# ---- what is not recognised is left, and named -----------------------------------------------------------------------


def test_what_looks_right_but_computes_something_else_is_left():
    """A subclass may keep every name and change the arithmetic: the proof sees it."""

    class Doubled(transformers.models.llama.modeling_llama.LlamaMLP):
        def forward(self, x):
            return 2.0 * super().forward(x)

    class Shifted(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1.0

    model = build("llama")
    model.model.layers[0].mlp.__class__ = Doubled
    model.model.norm.__class__ = Shifted
    expected = run(model, batch("llama"))
    report = explain(accelerate(model))
    assert "left, Doubled, it computes something else" in report and "model.layers.*.mlp" in report
    assert "left, Shifted, it computes something else" in report and "model.norm" in report
    assert_same(run(model, batch("llama")), expected)


def test_models_without_the_interface_keep_their_attention():
    config = transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0)
    torch.manual_seed(0)
    model = transformers.XLNetLMHeadModel(config).train()
    ids = torch.randint(3, VOCABULARY, (2, 9))
    expected = run(model, {"input_ids": ids, "labels": ids})
    report = explain(accelerate(model))
    assert "left, XLNetLMHeadModel, its attention is not called through Transformers' interface" in report
    assert (
        "layer norm: " in report
        and "feed-forward block (gelu, residual and norm): transformer.layer.*.ff (2)" in report
    )
    assert_same(run(model, {"input_ids": ids, "labels": ids}), expected)


def test_models_without_weights_are_left():
    with torch.device("meta"):
        model = build("llama")
    report = explain(accelerate(model))
    assert "it has no weights yet" in report and "RMS norm" not in report


def test_experts_are_named():
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=40,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM._from_config(config, attn_implementation="eager").train()
    ids = torch.randint(3, VOCABULARY, (2, 9))
    expected = run(model, {"input_ids": ids, "labels": ids})
    report = explain(accelerate(model))
    assert "left, MixtralExperts, nothing that we have is of its shape: model.layers.*.mlp.experts" in report
    assert_same(run(model, {"input_ids": ids, "labels": ids}), expected)


def test_norms_of_other_kinds():
    """Layer norm about one (Nemotron), whose squared relu nothing stands in for; norms without weights (OLMo)."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40,
    }  # fmt: skip
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    for name, norms in (
        ("Nemotron", "layer norm with weight 1 + w: model.layers.*.input_layernorm"),
        ("Olmo", "left, OlmoLayerNorm, nothing that we have is of its shape"),
    ):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**shape)
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager").train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        expected = run(model, {"input_ids": ids, "labels": ids})
        report = explain(accelerate(model))
        assert norms in report and ("left, NemotronMLP" in report) == (name == "Nemotron")
        assert_same(run(model, {"input_ids": ids, "labels": ids}), expected)
