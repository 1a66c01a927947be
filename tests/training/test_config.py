"""RunConfig: files, overrides, defaults, and sentences that help."""

from __future__ import annotations

import re

import pytest

from llmengine.training import RunConfig
from llmengine.training.config_file import parse

FIELDS = {"corpus": "austen", "objective": "bert", "model": {"preset": "bert-tiny"}, "steps": 100}


def test_defaults_follow_the_objective():
    bert = RunConfig.from_dict(FIELDS)
    assert (bert.tokenizer.kind, bert.tokenizer.lowercase) == ("wordpiece", True)
    assert bert.schedule.warmup == 10
    gpt = RunConfig.from_dict({**FIELDS, "objective": "clm", "model": {"preset": "gpt-tiny"}})
    assert (gpt.tokenizer.kind, gpt.tokenizer.lowercase) == ("bpe", False)
    given = RunConfig.from_dict(FIELDS, ["tokenizer.path=somewhere", "schedule.warmup=0"])
    assert (given.tokenizer.path, given.tokenizer.vocab_size, given.schedule.warmup) == ("somewhere", None, 0)


def test_heads_and_pooler_follow_the_objective():
    tokens = {"pad_id": 0, "bos_id": None, "eos_id": None}
    bert = RunConfig.from_dict(FIELDS).transformer(500, **tokens)
    assert (bert.objectives, bert.pooler, bert.vocab_size) == (("mlm", "nsp"), "cls_tanh", 500)
    mlm = RunConfig.from_dict({**FIELDS, "objective": "mlm"}).transformer(500, **tokens)
    assert (mlm.objectives, mlm.pooler) == (("mlm",), "none")


@pytest.mark.parametrize("overrides", [(), ("tokenizer.path=x",), ("optimizer.clip_norm=null", "corpus=[a.txt, b]")])
def test_a_config_survives_its_file(tmp_path, overrides):
    config = RunConfig.from_dict(FIELDS, overrides)
    config.to_file(tmp_path / "config.yaml")
    assert RunConfig.from_file(tmp_path / "config.yaml") == config
    assert RunConfig.from_dict(config.to_dict()) == config


def test_yaml_and_toml_say_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "corpus: [a, b]\nobjective: clm\nsteps: 5\nmodel: {preset: gpt-tiny}\n"
        "optimizer: {lr: 1e-4, betas: [0.9, 0.95]}\n"
    )
    (tmp_path / "a.toml").write_text(
        'corpus = ["a", "b"]\nobjective = "clm"\nsteps = 5\nmodel.preset = "gpt-tiny"\n'
        "[optimizer]\nlr = 1e-4\nbetas = [0.9, 0.95]\n"
    )
    one, other = (RunConfig.from_file(tmp_path / name) for name in ("a.yaml", "a.toml"))
    assert one == other and one.optimizer.lr == 1e-4


def test_numbers_as_yaml_1_2_has_them():
    assert parse("[1e-4, 1E3, .5e2, 1.5e+3, 3, -2e-1]") == [1e-4, 1e3, 50.0, 1500.0, 3, -0.2]
    assert parse("1e") == "1e" and parse("a1e-4") == "a1e-4"


@pytest.mark.parametrize(
    "override, sentence",
    {
        "precision=bf17": "precision: must be 'fp32' or 'bf16', got 'bf17' (did you mean bf16?)",
        "data.batch_token=4": "data.batch_token is not a field (did you mean batch_tokens?); fields of data: sequence_",
        "optimiser.lr=3": "optimiser is not a field (did you mean optimizer?); fields: corpus, objective",
        "optimizer.lr=fast": "optimizer.lr: must be a valid number, got 'fast'",
        "optimizer.lr=.inf": "optimizer.lr: must be a finite number, got inf",
        "optimizer.lr=0": "optimizer.lr: must be greater than 0, got 0",
        "optimizer.betas=[0.9]": "optimizer.betas.1 is required",
        "optimizer.betas=[0.9, 1.0]": "optimizer.betas.1: must be less than 1, got 1.0",
        "model.preset=bert-bas": "model.preset: 'bert-bas' is not a preset (did you mean bert-base?)",
        "model.preset=[gpt2]": "model.preset: ['gpt2'] is not a preset",
        "model.n_head=2": "model.n_head is not a field (did you mean n_heads?)",
        "model.n_heads=3": "model: n_heads (3) must divide d_model (128)",
        "model.vocab_size=9": "model.vocab_size is filled in from tokenizer; leave it out",
        "model.objectives=[mlm]": "model.objectives is filled in from objective; leave it out",
        "model.type_vocab_size=0": 'model.type_vocab_size is 0; objective "bert" has two segments and needs 2',
        "model.preset=gpt2": 'objective: "bert" needs the architecture encoder; model is decoder',
        "objective=clm": 'objective: "clm" needs the architecture decoder; model is encoder',
        "schedule.warmup=101": "schedule.warmup (101) must be at most steps (100)",
        "data.sequence_length=600": "data.sequence_length (600) must be at most model.max_positions (512)",
        "data.batch_tokens=100": "data: batch_tokens (100) must be at least sequence_length (128)",
        "data=3": "data: must be a valid dictionary or instance of DataSection, got 3",
        "tokenizer={path: x, kind: bpe}": "tokenizer: kind belongs to a tokenizer that is trained",
        "corpus=[]": "corpus is empty",
        "steps=true": "steps: must be a valid integer, got True",
        "steps='5'": "steps: must be a valid integer, got '5'",
        "steps.x=3": "override 'steps.x=3': steps is 100, not a section",
        "steps": "override 'steps' is not section.field=value",
        "steps=[": "override 'steps=[': the value is not YAML",
    }.items(),
)
def test_sentences(override, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        RunConfig.from_dict(FIELDS, [override])


def test_each_wrong_field_has_a_line():
    with pytest.raises(ValueError) as caught:
        RunConfig.from_dict({"objective": "bert", "steps": -1, "seed": "x"})
    lines = str(caught.value).splitlines()
    assert lines == [
        "corpus is required",
        "model is required",
        "steps: must be greater than 0, got -1",
        "seed: must be a valid integer, got 'x'",
    ]


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("a.yaml", "steps: 1\nsteps: 2\n", "steps is given twice"),
        ("a.yaml", "steps: [1\n", "a.yaml: "),
        ("a.toml", "steps = \n", "a.toml: "),
        ("a.yaml", "- 1\n", "holds list; expected fields"),
        ("a.json", "{}", "a config is a .yaml, .yml or .toml file"),
        ("a.yaml", "steps: 1\n", "a.yaml:\ncorpus is required"),
    ],
)
def test_files_that_are_no_config(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        RunConfig.from_file(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such config file"):
        RunConfig.from_file(tmp_path / "nowhere.yaml")


def test_what_changed():
    config = RunConfig.from_dict(FIELDS)
    assert config.changed(RunConfig.from_dict(FIELDS, ["keep=9", "every.log=3", "data.workers=1", "device=cpu"])) == []
    other = RunConfig.from_dict(FIELDS, ["steps=200", "model.n_layers=3", "data.options.mask=0.2"])
    assert config.changed(other) == ["data.options.mask", "model.n_layers", "schedule.warmup", "steps"]
