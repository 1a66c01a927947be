"""TransformerConfig: what is allowed, what an error says, round trips and presets."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from llmengine import Transformer, TransformerConfig
from llmengine.convert import FAMILIES
from llmengine.models.presets import PRESETS

SMALL = {
    "architecture": "encoder", "vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48,
    "max_positions": 24,
}  # fmt: skip
# published parameter counts; a tied output embedding counts once
SIZES = {
    "bert-base": 110_106_428, "bert-large": 336_226_108, "gpt2": 124_439_808, "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200, "roberta-base": 124_697_433, "roberta-large": 355_412_057,
    "electra-small": 13_549_057, "electra-base": 109_483_009, "modernbert-base": 149_655_232,
    "modernbert-large": 395_881_664, "xlnet-base": 116_750_336, "xlnet-large": 360_300_800, "gpt": 116_534_784,
    "gpt-neo-125m": 125_198_592, "pythia-160m": 162_322_944, "pythia-1b": 1_011_781_632, "llama-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248, "smollm2-135m": 134_515_008, "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920, "gemma-2b": 2_506_172_416, "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952, "bart-base": 139_420_416 + 50_265, "bart-large": 406_291_456 + 50_265,
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-v1.1-small": 76_961_152,
}  # BART's logits have a bias that Hugging Face counts as a buffer  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name):
    config = TransformerConfig.preset(name)
    again = TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.to_dict() == config.to_dict()
    assert config.to_dict().keys() == TransformerConfig.model_fields.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_models_of_the_published_size(name):
    with torch.device("meta"):
        model = Transformer(TransformerConfig.preset(name))
    parameters = sum(p.numel() for p in model.parameters())
    if name in SIZES:
        assert parameters == SIZES[name]


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name]["family"] != "custom"])
def test_presets_are_models_of_their_family(name):
    """Hugging Face's class of the config.json that we write has as many parameters."""
    config = TransformerConfig.preset(name)
    theirs = FAMILIES[config.family].write_config(config.to_dict(), TransformerConfig.defaults())
    with torch.device("meta"):
        ours, model = (
            Transformer(config),
            getattr(transformers, theirs["architectures"][0])(transformers.AutoConfig.for_model(**theirs)),
        )
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if hasattr(model, "final_logits_bias"):
        expected += config.vocab_size
    if not config.tie_embeddings and config.family == "t5":  # Hugging Face ties it nevertheless
        expected += config.vocab_size * config.d_model
    assert sum(p.numel() for p in ours.parameters()) == expected


def test_a_preset_may_be_overridden():
    config = TransformerConfig.preset("bert-mini", vocab_size=100, dropout=0.0)
    assert (config.vocab_size, config.dropout, config.n_layers, config.family) == (100, 0.0, 4, "bert")
    assert TransformerConfig.from_dict({"preset": "bert-mini", "vocab_size": 100, "dropout": 0.0}) == config
    assert config.replace(dropout=0.1).dropout == 0.1 and config.dropout == 0.0


def test_a_list_of_objectives_is_a_tuple():
    config = TransformerConfig.from_dict(SMALL | {"objectives": ["mlm"]})
    assert config.objectives == ("mlm",) and config.to_dict()["objectives"] == ["mlm"]


def test_it_is_frozen():
    config = TransformerConfig.from_dict(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        config.d_model = 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 3}, "d_modle is not a field; fields: family, architecture"),
        ({"d_model": "32"}, "d_model: .*integer.*, got '32'"),
        ({"d_model": 32.0}, "d_model: .*integer.*, got 32.0"),
        ({"d_model": 0}, "d_model: .*greater than 0, got 0"),
        ({"n_layers": -1}, "n_layers: .*greater than 0, got -1"),
        ({"n_heads": 5}, r"n_heads \(5\) must divide d_model \(32\)"),
        ({"dropout": 1.0}, "dropout: .*less than 1, got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout: .*greater than or equal to 0, got -0.1"),
        ({"norm_eps": 0.0}, "norm_eps: .*greater than 0"),
        ({"activation": "tanh"}, "activation: .*'gelu'.*, got 'tanh'"),
        ({"architecture": "both"}, "architecture: .*'encoder', 'decoder' or 'encoder_decoder', got 'both'"),
        ({"norm_place": "middle"}, "norm_place: .*'post', 'pre', 'sandwich' or 'parallel', got 'middle'"),
        ({"family": "t6"}, "family: .*'bert', 'roberta', .*'t5' or 'custom', got 't6'"),
        ({"objectives": ["lm"]}, "objectives.0: .*'mlm', 'nsp', 'sop', .*'choice', got 'lm'"),
        ({"objectives": ["clm"]}, 'objectives: "clm" does not fit architecture "encoder"'),
        ({"objectives": ["mlm", "mlm"]}, r"objectives \['mlm', 'mlm'\] names one twice"),
        ({"objectives": ["nsp"]}, 'objectives: "nsp" and "sop" read the pooled token; set pooler to "cls_tanh"'),
        ({"architecture": "decoder", "objectives": ["mlm"]}, '"mlm" does not fit architecture "decoder"'),
        ({"pad_token_id": 61}, r"pad_token_id \(61\) must be below vocab_size \(61\)"),
        ({"eos_token_id": 99}, r"eos_token_id \(99\) must be below vocab_size \(61\)"),
        ({"bos_token_id": -1}, "bos_token_id: .*greater than or equal to 0, got -1"),
        ({"freeze_padding_row": True}, "freeze_padding_row needs pad_token_id"),
        ({"n_kv_heads": 3}, r"n_kv_heads \(3\) must divide n_heads \(4\)"),
        ({"n_decoder_layers": 2}, 'n_decoder_layers is for architecture "encoder_decoder"; this is "encoder"'),
        ({"architecture": "decoder", "share_layers": True}, 'share_layers is for architecture "encoder"'),
        ({"layer_types": ["full", "window"]}, "layer_types names windowed layers; give window"),
        ({"window": 3, "layer_types": ["full"]}, "layer_types has 1 entries for n_layers 2"),
        (
            {"architecture": "encoder_decoder", "n_decoder_layers": 3, "window": 3, "layer_types": ["full", "window"]},
            "layer_types has 2 entries for n_decoder_layers 3",
        ),
        ({"max_positions": None}, 'max_positions must be given: positions "learned" is a table'),
        ({"positions": "buckets", "position_buckets": 3}, r"position_buckets \(3\) must be from 4 to 511"),
        ({"positions": "buckets", "position_bucket_distance": 8}, r"\(32\) must be from 4 to 31: half of them"),
        ({"positions": "rotary", "position_offset": 2}, 'position_offset is for tables of positions; .*"rotary"'),
        ({"positions": "rotary", "d_head": 7}, "rotary turns pairs, but fraction 1.0 of 7 features is odd"),
        ({"rotary": {"scaling": "yarn"}}, 'rotary: scaling "yarn" needs original_positions'),
        ({"rotary": {"speed": 2}}, "speed"),
        ({"architecture": "decoder", "positions": "relative"}, 'positions "relative" is for architecture "encoder"'),
        ({"objectives": ["mlm", "plm"]}, '"mlm" and "plm" are one token head; choose one'),
        ({"objectives": ["classification"], "classifier": "pooled"}, 'classifier "pooled" reads the pooled token'),
        ({"loss_weights": {"nsp": 2.0}}, r"loss_weights names \['nsp'\], which are not among objectives"),
        ({"init": "neighbours", "positions": "rotary"}, 'init "neighbours" needs learned positions'),
        ({"preset": "bert-huge"}, "preset 'bert-huge' is not one of bert-base, "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message) as error:
        TransformerConfig.from_dict(SMALL | change)
    assert str(error.value).startswith("TransformerConfig: ")


@pytest.mark.parametrize("field", SMALL)
def test_a_missing_field_is_named(field):
    with pytest.raises(ValueError, match=f"TransformerConfig: {field} is required"):
        TransformerConfig.from_dict({key: value for key, value in SMALL.items() if key != field})


def test_every_wrong_field_is_told_at_once():
    with pytest.raises(ValueError, match=r"d_model.*; n_heads.*; vocab is not a field"):
        TransformerConfig.from_dict(SMALL | {"d_model": 0, "n_heads": "4", "vocab": 3})


def test_the_model_wants_a_config():
    with pytest.raises(TypeError, match="config must be a TransformerConfig, got dict"):
        Transformer(SMALL)


@pytest.mark.parametrize("family", ["bert-mini", "gpt-mini"])
def test_initial_weights(family):
    torch.manual_seed(0)
    config = TransformerConfig.preset(family, vocab_size=500)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == (1.0 if name.endswith("norm.weight") else 0.0)).all(), name
            continue
        residual = config.scale_residual_init and ("attention.out" in name or "feed_forward.down" in name)
        expected = config.init_std / (8**0.5 if residual else 1)
        if name == "heads.nsp.weight" or name == "encoder.embeddings.token_type.weight":
            assert parameter.std().item() == pytest.approx(expected, rel=0.2), name
        else:
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
    if config.freeze_padding_row:
        assert (model.words.weight[config.pad_token_id] == 0).all()


def test_a_seed_gives_the_weights():
    config = TransformerConfig.from_dict(SMALL | {"objectives": ["mlm"]})
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(Transformer(config).state_dict()["encoder.layers.1.attention.qkv.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_vocab_size": 9}, "encoder_vocab_size is for an encoder with words of its own"),
        (
            {"architecture": "decoder", "share_embeddings": False, "objectives": []},
            'share_embeddings false is for architecture "encoder_decoder"; this is "decoder"',
        ),
        (
            {"share_embeddings": False, "encoder_vocab_size": 2, "pad_token_id": 3, "freeze_padding_row": True},
            "freeze_padding_row needs pad_token_id, a row of every word embedding",
        ),
        ({"n_decoder_heads": 3}, r"n_decoder_heads \(3\) must divide d_model"),
        (
            {"n_decoder_heads": 8, "n_kv_heads": 3, "n_heads": 6, "d_head": 4},
            r"n_kv_heads \(3\) must divide n_decoder_heads",
        ),
        (
            {"architecture": "encoder", "d_decoder_ff": 8, "objectives": []},
            'd_decoder_ff is for architecture "encoder_d',
        ),
        ({"architecture": "decoder", "n_decoder_heads": 2, "objectives": []}, "n_decoder_heads is for architecture"),
    ],
)
def test_a_decoder_of_other_numbers_must_fit(fields, message):
    preset = {"preset": "transformer-base", "d_model": 32, "n_heads": 4, "d_ff": 48, "n_layers": 1, "vocab_size": 99}
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(preset | fields)


def test_a_decoder_of_other_numbers():
    config = TransformerConfig.preset("transformer-base", n_decoder_heads=4, d_decoder_ff=64)
    side = config.decoder_side
    assert (side.n_heads, side.head_dim, side.d_ff, side.d_model) == (4, 128, 64, config.d_model)
    assert (config.n_heads, config.head_dim) == (8, 64) and TransformerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("preset", ["gpt-tiny", "llama-tiny", "pythia-160m", "qwen3-0.6b", "gemma3-1b"])
def test_a_preset_of_a_decoder_classifies_by_its_last_token(preset):
    config = TransformerConfig.preset(preset, objectives=["classification"])
    assert (config.summary, config.classifier_bias) == ("last", False), "as Hugging Face's of these families"
