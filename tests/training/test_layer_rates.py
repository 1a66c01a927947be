"""Learning rates by depth, name by name."""

from __future__ import annotations

import pytest
import torch

from llmengine import Transformer, TransformerConfig
from llmengine.training.layer_rates import depth
from llmengine.training.optimizer import adamw
from llmengine.training.sections import OptimizerSection

SMALL = {"vocab_size": 61, "n_layers": 3, "n_heads": 2, "d_model": 16, "d_ff": 24, "bos_token_id": 1, "eos_token_id": 2}
DEPTHS = {
    "bert-base": {
        "heads.classification.out.weight": 0, "pooler.dense.weight": 0, "encoder.layers.2.attention.qkv.weight": 1,
        "encoder.layers.1.feed_forward.up.bias": 2, "encoder.layers.0.attention_norm.weight": 3,
        "encoder.embeddings.word.weight": 4, "encoder.embeddings.position.weight": 4, "encoder.embeddings.norm.bias": 4,
    },
    "gpt2": {
        "heads.classification.out.weight": 0, "decoder.final_norm.weight": 0, "decoder.layers.2.attention.out.bias": 1,
        "decoder.layers.0.feed_forward.down.weight": 3, "decoder.embeddings.word.weight": 4,
        "decoder.embeddings.position.weight": 4,
    },
    "bart-base": {
        "heads.classification.out.weight": 0, "decoder.layers.1.cross_attention.kv.weight": 1,
        "decoder.layers.0.attention.qkv.weight": 2, "encoder.layers.2.attention.qkv.weight": 3,
        "encoder.layers.0.feed_forward.up.weight": 5, "encoder.embeddings.word.weight": 6,
        "encoder.embeddings.position.weight": 6, "decoder.embeddings.position.weight": 6,
    },
    "t5-small": {
        "heads.classification.out.weight": 0, "decoder.final_norm.weight": 0,
        "decoder.layers.1.feed_forward.up.weight": 1, "decoder.layers.0.attention.qkv.weight": 2,
        "decoder.distance_buckets.embedding.weight": 2, "encoder.final_norm.weight": 3,
        "encoder.layers.2.attention.qkv.weight": 3, "encoder.layers.0.attention.out.weight": 5,
        "encoder.distance_buckets.embedding.weight": 5, "encoder.embeddings.word.weight": 6,
    },
    "albert-base": {
        "heads.classification.out.weight": 0, "encoder.layers.0.attention.qkv.weight": 1,
        "encoder.embeddings.word.weight": 2, "encoder.embeddings.project.weight": 2,
    },
    "xlnet-base": {
        "heads.classification.dense.weight": 0, "encoder.layers.2.attention.content_bias": 1,
        "encoder.layers.0.attention.r.weight": 3, "encoder.embeddings.word.weight": 4,
        "encoder.embeddings.query_stream": 4,
    },
}  # fmt: skip


def model_of(preset: str) -> Transformer:
    layers = {"n_decoder_layers": 2} if preset in ("bart-base", "t5-small") else {}
    others = {"albert-base": {"d_embed": 8}, "gpt2": {"summary": "last"}}.get(preset, {})
    return Transformer(TransformerConfig.preset(preset, **SMALL, **layers, **others, objectives=["classification"]))


@pytest.mark.parametrize("preset", DEPTHS)
def test_each_layer_learns_less_than_the_one_above(preset):
    model = model_of(preset)
    groups = adamw(model, OptimizerSection(weight_decay=0.1), layer_decay=0.5).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shares = {names[id(p)]: group["share"] for group in groups for p in group["params"]}
    assert shares.keys() == set(names.values())
    assert shares == {name: 0.5 ** depth(name, model.config) for name in shares}
    assert {name: shares[name] for name in DEPTHS[preset]} == {name: 0.5**d for name, d in DEPTHS[preset].items()}
    most = max(DEPTHS[preset].values())
    assert {name for name, share in shares.items() if share == 0.5**most} == {n for n in shares if ".embeddings." in n}
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    plain = adamw(model, OptimizerSection(weight_decay=0.1)).param_groups
    assert decays == {names[id(p)]: group["weight_decay"] for group in plain for p in group["params"]}
    assert [group["share"] for group in plain] == [1.0, 1.0]


def test_the_loop_uses_them(tmp_path):
    """Without gradients' history Adam's first step is lr times the sign of the gradient: the step is the rate."""
    from llmengine.training import train
    from tests.training.finetunes import tiny
    from tests.training.runs import At

    class Watch(At):
        def started(self, run, step, records):
            self.before = {n: p.detach().clone() for n, p in run.transformer.named_parameters()}

        def recorded(self, run, record):
            if record["kind"] == "train":
                moved = {n: (p.detach() - self.before[n]).abs() for n, p in run.transformer.named_parameters()}
                self.moved = {n: float(m.max()) for n, m in moved.items()}

    watch = Watch()
    options = ("steps=1", "validation=0", "optimizer.layer_decay=0.5", "optimizer.weight_decay=0", "schedule.warmup=0",
               "optimizer.lr=0.01")  # fmt: skip
    train(tiny(tmp_path, *options), tmp_path / "run", observers=[watch])
    for name, expected in {
        "heads.classification.out.weight": 0.01, "encoder.layers.1.attention.qkv.weight": 0.005,
        "encoder.layers.0.attention.qkv.weight": 0.0025, "encoder.embeddings.word.weight": 0.00125,
    }.items():  # fmt: skip
        assert watch.moved[name] == pytest.approx(expected, rel=1e-3)


def test_parameters_outside_of_a_transformer_learn_fully():
    module = torch.nn.Linear(2, 2)
    assert [group["share"] for group in adamw(module, OptimizerSection(), layer_decay=0.5).param_groups] == [1.0, 1.0]
