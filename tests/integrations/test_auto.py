"""Transformers' auto classes, pipelines, Trainer and `generate` on our own models, beside our own use of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from llmengine import Transformer, TransformerConfig
from llmengine.integrations.transformers import register
from llmengine.integrations.transformers.auto import LlmengineConfig

register()
register()  # is idempotent

VOCABULARY, LENGTH = 61, 24
SHAPE = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "family": "custom"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert-base", {"max_positions": LENGTH}),
    "gpt2": ("gpt2", {"max_positions": LENGTH}),
    "llama": ("smollm2-135m", {"n_kv_heads": 2, "summary": "last"}),
    "window": ("smollm2-135m", {"n_kv_heads": 2, "window": 3}),
    "alibi": ("gpt2", {"positions": "alibi", "max_positions": None}),
    "bart": ("bart-base", {"max_positions": LENGTH, "decoder_start_token_id": 2, "n_decoder_layers": 3}),
    "t5": ("t5-base", {"d_head": 8, "decoder_start_token_id": 0, "position_buckets": 8, "head_scale": 1.0}),
    "xlnet": ("xlnet-base", {}),
}
# auto class, family, objective
CASES = [
    ("AutoModel", "bert", None),
    ("AutoModel", "gpt2", None),
    ("AutoModel", "bart", None),
    ("AutoModelForMaskedLM", "bert", "mlm"),
    ("AutoModelForCausalLM", "gpt2", "clm"),
    ("AutoModelForCausalLM", "llama", "clm"),
    ("AutoModelForCausalLM", "xlnet", "plm"),
    ("AutoModelForSeq2SeqLM", "bart", "seq2seq"),
    ("AutoModelForSeq2SeqLM", "t5", "seq2seq"),
    ("AutoModelForSequenceClassification", "bert", "classification"),
    ("AutoModelForSequenceClassification", "llama", "classification"),
    ("AutoModelForTokenClassification", "bert", "tagging"),
    ("AutoModelForQuestionAnswering", "bert", "qa"),
    ("AutoModelForQuestionAnswering", "xlnet", "qa"),
    ("AutoModelForMultipleChoice", "bert", "choice"),
]
every_class = pytest.mark.parametrize(("auto", "family", "objective"), CASES, ids=lambda value: str(value))


def ours(family: str, *objectives: str, seed: int = 0, **fields: Any) -> Transformer:
    """A small model whose weights are perturbed, so that zero biases and unit norms hide nothing."""
    torch.manual_seed(seed)
    preset, own = PRESETS[family]
    rates = dict.fromkeys(("dropout", "embed_dropout", "attention_dropout"), 0.0)
    given = SHAPE | TOKENS | rates | own | {"objectives": list(objectives)} | fields
    model = Transformer(TransformerConfig.preset(preset, **given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def saved(model: Transformer, directory: Path) -> str:
    model.save_pretrained(directory)
    return str(directory)


def loaded(auto: str, directory: Path | str, **options: Any) -> Any:
    return getattr(transformers, auto).from_pretrained(directory, **options)


def assert_same(theirs: Tensor, expected: Tensor) -> None:
    """Equal weights may lie otherwise in memory, and then sums round otherwise in their last bits."""
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-6)


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def batch_of(model: Transformer, objective: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, padded on the right, and labels."""
    ids, mask = ids_of(3, 9), (torch.arange(9) < torch.tensor([[9], [6], [7]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if objective == "choice":
        inputs = {name: torch.stack([x, x.flip(0)], 1) for name, x in inputs.items()}
    if model.decoder is not None and model.encoder is not None:
        inputs["decoder_input_ids"] = ids_of(3, 5, seed=1)
    likes = {"mlm": ids, "clm": ids, "plm": ids, "seq2seq": ids_of(3, 5, seed=2), "tagging": ids % 2}
    labels = {"labels": likes[objective]} if objective in likes else {"labels": torch.tensor([0, 1, 1])}
    if objective == "qa":
        labels = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 4, 3])}
    return inputs, {} if objective is None else labels


# ---- files -----------------------------------------------------------------------------------------------------------


@every_class
def test_every_class_computes_what_our_model_does(auto, family, objective, tmp_path):
    direct = ours(family, *([objective] if objective else []))
    model = loaded(auto, saved(direct, tmp_path / "ours"))
    assert not model.training and model.transformer.config == direct.config
    inputs, labels = batch_of(direct, objective)
    expected, output = direct(**inputs), model(**inputs)
    assert isinstance(output, transformers.utils.ModelOutput)
    names = ["start_logits", "end_logits"] if objective == "qa" else ["logits" if objective else "last_hidden_state"]
    for name in names:
        assert_same(output[name], getattr(expected, name))
    assert_same(model(**inputs, return_dict=False)[0], output[0])
    if objective:
        output = model(**inputs, **labels)
        assert_same(output.loss, direct(**inputs, **labels).loss)
        assert output.loss > 0
        assert_same(output[1], model(**inputs)[0])  # in evaluation logits come with the loss

    model.save_pretrained(tmp_path / "theirs")
    again = Transformer.from_pretrained(tmp_path / "theirs")
    assert again.config == direct.config
    states = again.state_dict(), direct.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert again.words.weight.dtype == torch.float32
    assert type(loaded(auto, tmp_path / "theirs")) is type(model)


def test_hidden_states_are_ours(tmp_path):
    for auto, family, objective in (("AutoModelForMaskedLM", "bert", "mlm"), ("AutoModel", "bart", None)):
        direct = ours(family, *([objective] if objective else []))
        model = loaded(auto, saved(direct, tmp_path / family))
        inputs, _ = batch_of(direct, objective)
        expected, output = (m(**inputs, output_hidden_states=True) for m in (direct, model))
        theirs = output.decoder_hidden_states if family == "bart" else output.hidden_states
        assert len(theirs) == len(expected.hidden_states)
        for pair in zip(theirs, expected.hidden_states, strict=True):
            assert_same(*pair)
        if family == "bart":
            assert_same(output.encoder_last_hidden_state, expected.encoder_last_hidden_state)
            for pair in zip(output.encoder_hidden_states, expected.encoder_hidden_states, strict=True):
                assert_same(*pair)
        with pytest.raises(ValueError, match="output_attentions"):
            model(**inputs, output_attentions=True)


def test_a_file_without_the_head_gives_a_fresh_one(tmp_path, caplog):
    direct = ours("bert", "mlm", "nsp", loss_weights={"mlm": 1.0, "nsp": 0.5})
    directory = saved(direct, tmp_path / "ours")
    names = {i: f"class {i}" for i in range(5)}
    model = loaded("AutoModelForSequenceClassification", directory, num_labels=5, id2label=names)
    own = model.transformer
    assert own.config.objectives == ("classification",) and own.config.n_labels == 5 and own.config.loss_weights == {}
    assert torch.equal(own.words.weight, direct.words.weight) and torch.equal(
        own.pooler.dense.weight, direct.pooler.dense.weight
    )
    head = own.heads["classification"].out
    assert head.weight.shape == (5, 32) and 0 < head.weight.std() < 3 * own.config.init_std and not head.bias.any()
    model.save_pretrained(tmp_path / "classifier")
    assert Transformer.from_pretrained(tmp_path / "classifier").config.n_labels == 5
    again = loaded("AutoModelForSequenceClassification", tmp_path / "classifier")
    assert again.config.id2label == names and torch.equal(
        again.transformer.heads["classification"].out.weight, head.weight
    )
    assert again.config.problem_type == "single_label_classification"

    regression = loaded("AutoModelForSequenceClassification", directory, num_labels=1)
    assert regression.transformer.config.problem == "regression"
    several = loaded("AutoModelForSequenceClassification", directory, problem_type="multi_label_classification")
    assert several.transformer.config.problem == "multi" and several.transformer.config.n_labels == 2


def test_a_file_without_the_backbone_is_an_error(tmp_path):
    directory = Path(saved(ours("bert", "mlm"), tmp_path / "ours"))
    tensors = load_file(directory / "model.safetensors")
    del tensors["encoder.layers.1.attention.out.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the file lacks encoder\.layers\.1\.attention\.out\.weight"):
        loaded("AutoModelForMaskedLM", directory)


def test_a_class_that_does_not_fit_is_an_error(tmp_path):
    directory = saved(ours("gpt2", "clm"), tmp_path / "ours")
    with pytest.raises(ValueError, match='"mlm" does not fit architecture "decoder"'):
        loaded("AutoModelForMaskedLM", directory)
    with pytest.raises(ValueError, match="config is required"):
        LlmengineConfig()
    with pytest.raises(ValueError, match="n_heads"):
        LlmengineConfig(config=json.loads((Path(directory) / "config.json").read_text())["config"] | {"n_heads": 5})


def test_a_new_model_is_ours(tmp_path):
    config = LlmengineConfig(ours("gpt2", "clm").config)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    expected = Transformer(config.own()).state_dict()
    state = model.transformer.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_the_config_speaks_both_languages(tmp_path):
    directory = saved(ours("llama", "clm", n_layers=3), tmp_path / "ours")
    config = transformers.AutoConfig.from_pretrained(directory)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCABULARY, 32, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.pad_token_id) == (4, 2, 0)
    config.pad_token_id = 5
    assert config.own().pad_token_id == 5
    with pytest.raises(ValueError, match=r"pad_token_id \(99\) must be below vocab_size"):
        config.pad_token_id = 99
    config.save_pretrained(tmp_path / "config")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "config")
    kept, written = ({**c.to_dict(), "_name_or_path": ""} for c in (config, again))
    assert kept == written


def test_shards_and_another_dtype(tmp_path):
    direct = ours("bert", "mlm")
    model = loaded("AutoModelForMaskedLM", saved(direct, tmp_path / "ours"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = Transformer.from_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(again[name], tensor.bfloat16()) for name, tensor in direct.state_dict().items())


# ---- generation ------------------------------------------------------------------------------------------------------

DECODERS = ["gpt2", "llama", "window", "alibi", "xlnet"]
WRITERS = [*DECODERS, "bart", "t5"]


def writer(family: str, directory: Path) -> tuple[Transformer, Any]:
    objective = {"xlnet": "plm", "bart": "seq2seq", "t5": "seq2seq"}.get(family, "clm")
    direct = ours(family, objective)
    auto = "AutoModelForSeq2SeqLM" if objective == "seq2seq" else "AutoModelForCausalLM"
    return direct, loaded(auto, saved(direct, directory))


def prompts() -> dict[str, Tensor]:
    """Padded on the left."""
    mask = (torch.arange(7) >= torch.tensor([[0], [3], [2]])).long()
    return {"input_ids": torch.where(mask.bool(), ids_of(3, 7), 0), "attention_mask": mask}


def assert_continues_alike(theirs: Tensor, expected: Tensor) -> None:
    """But for what follows an end: Transformers' beams fill up with ends where the padding is token 0."""
    for row, other in zip(theirs.tolist(), expected.tolist(), strict=True):
        while row[-1] in (0, 2):
            row.pop()
        while other[-1] in (0, 2):
            other.pop()
        assert row == other


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}],
    ids=["greedy", "beams", "penalties"],
)
def test_generate_continues_as_ours(family, options, tmp_path):
    direct, model = writer(family, tmp_path)
    theirs = model.generate(**prompts(), max_new_tokens=8, do_sample=False, **options)
    assert_continues_alike(theirs, direct.generate(**prompts(), max_new_tokens=8, **options))
    assert len(set(theirs[:, -8:].flatten().tolist())) > 2


@pytest.mark.parametrize("family", WRITERS)
def test_a_cache_changes_nothing(family, tmp_path):
    _, model = writer(family, tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**prompts(), **options), model.generate(**prompts(), **options, use_cache=False))


@pytest.mark.parametrize("family", ["gpt2", "window", "alibi"])
def test_a_text_in_pieces(family, tmp_path):
    _, model = writer(family, tmp_path)
    ids, mask = prompts().values()
    whole = model(ids, mask, use_cache=True).logits
    first = model(ids[:, :4], mask[:, :4], use_cache=True)
    second = model(ids[:, 4:], mask, cache=first.cache)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1)[mask.bool()], whole[mask.bool()])
    last = model(ids, mask, use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(last, whole[:, -1:])
    chunked = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, prefill_chunk_size=2)
    assert torch.equal(chunked, model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False))


def test_sampling_draws_as_ours(tmp_path):
    direct, model = writer("gpt2", tmp_path)
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(5)
    theirs = model.generate(**prompts(), **options)
    torch.manual_seed(5)
    assert_continues_alike(theirs, direct.generate(**prompts(), **options))


def test_what_else_transformers_does_with_a_model_that_generates(tmp_path):
    """A streamer, scores, hidden states, an assistant that guesses ahead; and words it does not know."""
    _, model = writer("gpt2", tmp_path)
    inputs = {"input_ids": ids_of(1, 6)}
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **options)
    out = model.generate(
        **inputs, **options, return_dict_in_generate=True, output_scores=True, output_hidden_states=True
    )
    assert torch.equal(out.sequences, plain) and torch.equal(torch.cat(out.scores).argmax(1), plain[0, 6:])
    assert out.hidden_states[0][-1].shape == (1, 6, 32) and out.hidden_states[1][-1].shape == (1, 1, 32)
    _, assistant = writer("llama", tmp_path / "assistant")
    assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), plain)
    with pytest.raises(ValueError, match="tempreature"):
        model.generate(**inputs, tempreature=0.5)
    with pytest.raises(ValueError, match="position_ids holds 24"):
        model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    with pytest.raises(ValueError, match="labels given, which does not go with a cache"):
        model(**inputs, labels=inputs["input_ids"], cache=transformers.DynamicCache())
    _, xlnet = writer("xlnet", tmp_path / "xlnet")
    for option in ({"cache": transformers.DynamicCache()}, {"use_mems": True}):
        with pytest.raises(ValueError, match="XLNet has no cache"):
            xlnet(**inputs, **option)


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_holds_no_logits(tmp_path):
    direct = ours("gpt2", "clm")
    model = loaded("AutoModelForCausalLM", saved(direct, tmp_path)).train()
    ids = ids_of(2, 8)
    assert model(ids, labels=ids).logits is None
    assert_same(model(ids, labels=ids, return_logits=True).logits, direct(ids).logits)


def test_activation_checkpointing_changes_nothing(tmp_path):
    model = loaded("AutoModelForMaskedLM", saved(ours("bert", "mlm"), tmp_path)).train()
    ids, gradients = ids_of(2, 8), []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        assert model.transformer.gradient_checkpointing is enable
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_same(*gradients)
    assert gradients[0].abs().sum() > 0


def trainer(model: Any, data: list, directory: Path, kind: Any = Trainer, **options: Any) -> Trainer:
    arguments = TrainingArguments if kind is Trainer else Seq2SeqTrainingArguments
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    } | options
    args = arguments(
        output_dir=str(directory), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **options
    )
    return kind(model=model, args=args, train_dataset=data, eval_dataset=data)


def rows_of(model: Transformer, objective: str) -> list[dict[str, Tensor]]:
    inputs, labels = batch_of(model, objective)
    inputs.pop("decoder_input_ids", None)
    columns = inputs | labels
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] * 4


@pytest.mark.parametrize(("auto", "family", "objective"), [case for case in CASES if case[2]], ids=lambda v: str(v))
def test_trainer_trains_and_evaluates(auto, family, objective, tmp_path):
    direct = ours(family, objective)
    model = loaded(auto, saved(direct, tmp_path / "ours"))
    run = trainer(model, rows_of(direct, objective), tmp_path, gradient_accumulation_steps=2)
    inputs, labels = batch_of(direct, objective)
    inputs.pop("decoder_input_ids", None)
    before = run.evaluate()["eval_loss"]
    if objective not in ("plm", "clm", "mlm", "tagging", "seq2seq"):  # a mean of equal batches' means
        assert before == pytest.approx(direct(**inputs, **labels).loss.item(), rel=1e-4)
    predicted = run.predict(run.eval_dataset)
    assert predicted.predictions is not None and predicted.label_ids is not None
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * before


def test_trainer_goes_on_from_its_checkpoints(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    direct = ours("bert", "mlm", dropout=0.1)
    directory = saved(direct, tmp_path / "ours")
    whole = loaded("AutoModelForMaskedLM", directory)
    trainer(whole, rows_of(direct, "mlm"), tmp_path, **options, load_best_model_at_end=True).train()
    resumed = loaded("AutoModelForMaskedLM", directory)
    run = trainer(resumed, rows_of(direct, "mlm"), tmp_path, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.allclose(states[0][name], states[1][name], rtol=0, atol=1e-6) for name in states[0])
    last = Transformer.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(last[name], states[1][f"transformer.{name}"]) for name in last)
    assert any(not torch.equal(last[name], tensor) for name, tensor in direct.state_dict().items())


def test_seq2seq_trainer_generates(tmp_path):
    direct = ours("bart", "seq2seq")
    model = loaded("AutoModelForSeq2SeqLM", saved(direct, tmp_path / "ours"))
    run = trainer(model, rows_of(direct, "seq2seq"), tmp_path, Seq2SeqTrainer, predict_with_generate=True)
    inputs, _ = batch_of(direct, "seq2seq")
    inputs.pop("decoder_input_ids")
    predicted = run.predict(run.eval_dataset, max_new_tokens=5, num_beams=1, do_sample=False)
    expected = direct.generate(**inputs, max_new_tokens=5)
    written = torch.tensor(predicted.predictions[:3, : expected.shape[1]])
    assert torch.equal(written, expected)


# ---- pipelines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(VOCABULARY - len(special)))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        unk_token="[UNK]", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def pipeline_of(task: str, direct: Transformer, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Any:
    direct.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return transformers.pipeline(task, model=str(directory), device="cpu")


TEXTS = ["w3 w4 [MASK] w6 w7", "w9 [MASK] w1"]


def test_fill_mask(tokenizer, tmp_path):
    direct = ours("bert", "mlm")
    answers = pipeline_of("fill-mask", direct, tokenizer, tmp_path)(TEXTS, top_k=3)
    for text, answer in zip(TEXTS, answers, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        place = int((batch["input_ids"][0] == tokenizer.mask_token_id).nonzero())
        best = direct(**batch).logits[0, place].softmax(-1).topk(3)
        assert [entry["token"] for entry in answer] == best.indices.tolist()
        assert [entry["score"] for entry in answer] == pytest.approx(best.values.tolist(), rel=1e-5)


def test_text_generation(tokenizer, tmp_path):
    direct = ours("gpt2", "clm")
    pipe = pipeline_of("text-generation", direct, tokenizer, tmp_path)
    answer = pipe("w3 w4 w5", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = tokenizer("w3 w4 w5", return_tensors="pt", add_special_tokens=False)["input_ids"]
    if pipe.preprocess("w3 w4 w5")["input_ids"].shape != ids.shape:  # with special tokens
        ids = tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    expected = direct.generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
    assert answer.split() == tokenizer.decode(expected, skip_special_tokens=True).split() and answer.split()


def test_text_classification(tokenizer, tmp_path):
    for problem in ("single", "multi"):
        direct = ours("bert", "classification", n_labels=3, problem=problem)
        answers = pipeline_of("text-classification", direct, tokenizer, tmp_path / problem)(TEXTS, top_k=None)
        for text, answer in zip(TEXTS, answers, strict=True):
            logits = direct(**tokenizer(text, return_tensors="pt")).logits[0]
            scores = logits.softmax(-1) if problem == "single" else logits.sigmoid()
            found = {entry["label"]: entry["score"] for entry in answer}
            assert found == pytest.approx({f"LABEL_{i}": p for i, p in enumerate(scores.tolist())}, rel=1e-5)


def test_token_classification(tokenizer, tmp_path):
    direct = ours("bert", "tagging", n_labels=3)
    answer = pipeline_of("token-classification", direct, tokenizer, tmp_path)(TEXTS[0], ignore_labels=[])
    tags = direct(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0].argmax(-1)
    assert [entry["entity"] for entry in answer] == [f"LABEL_{tag}" for tag in tags[1:-1]]


def test_feature_extraction(tokenizer, tmp_path):
    direct = ours("bert")
    features = torch.tensor(pipeline_of("feature-extraction", direct, tokenizer, tmp_path)(TEXTS[0]))
    torch.testing.assert_close(features, direct(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state)
    assert math.isfinite(features.sum())
