"""What fine-tuning learns, begins with, writes and refuses."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers

from llmengine import Transformer, tasks
from llmengine.data.tokenizer import Tokenizer
from llmengine.training import FinetuneConfig, ProgressLine, train
from llmengine.training.finetune_data import split
from llmengine.training.finetuning import Finetuning
from llmengine.training.plot import LossPlot
from llmengine.training.run import Folder
from tests.training.finetunes import pretrained, rows, tiny, write
from tests.training.runs import run

CPU = torch.device("cpu")


def prepared(tmp_path, *overrides: str) -> Finetuning:
    return Finetuning.prepare(tiny(tmp_path, *overrides), Folder(tmp_path / "run"), CPU, print)


def test_a_small_model_learns_the_task(tmp_path, capsys):
    write(tmp_path / "test.jsonl", rows(50, seed=7))
    config = tiny(tmp_path, "epochs=12", "steps=null", "every.evaluate=epoch", f"test={tmp_path}/test.jsonl")
    result = train(config, tmp_path / "run", observers=[ProgressLine(), LossPlot()])
    assert result.best.name == "accuracy" and result.best.value == 1.0
    assert result.test.scores["accuracy"].value > 0.95 and result.test.rows == 50
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [r["epoch"] for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    assert [e["step"] for e in evaluations] == [i + 1 for i, epoch in enumerate(epochs) if epoch == int(epoch)]
    assert epochs[-1] == 12.0 and len(evaluations) == 12
    assert {"accuracy", "macro_f1"} < set(evaluations[0]["scores"]) and evaluations[0]["select"] == "accuracy"
    out = capsys.readouterr().out
    assert f"step {result.best.step}  held out: loss" in out and "accuracy 1.0000" in out and "the best so far" in out
    files = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "task.json"}
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0
    assert json.loads((tmp_path / "run" / "evaluation" / "scores.json").read_text())["rows"] == 50
    # the directory is all that is needed to answer, by us and by transformers
    directory = tmp_path / "run" / "model"
    model, task = Transformer.from_pretrained(directory), tasks.load(directory, Tokenizer.load(directory))
    asked = [{"text": "the soup was lovely"}, {"text": "a dull film"}]
    assert [answer["label"] for answer in task.answers(model, asked)] == ["good", "bad"]
    pipeline = transformers.pipeline("text-classification", model=str(directory), device="cpu")
    assert [found["label"] for found in pipeline([row["text"] for row in asked])] == ["good", "bad"]


def test_the_held_out_loss_is_the_mean_over_rows(tmp_path):
    ours = prepared(tmp_path, "data.batch_tokens=20")
    record = ours.evaluate()
    assert len(ours.rows.held_out) == 12 and ours.held_out.steps_per_epoch > 2
    model = ours.transformer.eval()
    losses = []
    for i in range(12):
        example = ours.held_out.examples[0, i]
        logits = model(example["input_ids"][None], token_type_ids=example["token_type_ids"][None]).logits
        losses.append(torch.nn.functional.cross_entropy(logits, example["labels"][None]).item())
    assert record["loss"] == pytest.approx(sum(losses) / 12, rel=1e-5)


def test_rows_are_held_out_once_and_by_seed():
    made = [{"text": str(i)} for i in range(50)]
    train_rows, held_out = split(made, 0.2, seed=1)
    assert len(held_out) == 10 and sorted([*train_rows, *held_out], key=made.index) == made
    assert split(made, 0.2, seed=1) == (train_rows, held_out) != split(made, 0.2, seed=2)
    assert split(made, 0.0, seed=1) == (made, []) and len(split(made, 0.001, seed=1)[1]) == 1
    with pytest.raises(ValueError, match=r"train has 1 rows, too few to hold out 0\.5 of them"):
        split(made[:1], 0.5, 0)


def test_files_may_name_their_columns_otherwise(tmp_path):
    (tmp_path / "a.csv").write_text("review,stars\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows(20)))
    ours = prepared(tmp_path, f"train=[{tmp_path}/a.csv]", "columns={text: review, label: stars}", "validation=0.5")
    assert len(ours.rows.train) == 10 and set(ours.task.labels) == {"good", "bad"}


def test_a_class_of_validation_rows_alone_is_named(tmp_path):
    write(tmp_path / "validation.jsonl", [*rows(4), {"text": "so so", "label": "mixed"}])
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 5: label is 'mixed'; expected one of bad, good"):
        prepared(tmp_path, f"validation={tmp_path}/validation.jsonl")


def test_test_rows_without_answers_are_named_before_training(tmp_path):
    write(tmp_path / "test.jsonl", [{"text": "so so"}])
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1 has no 'label'; its columns: text"):
        prepared(tmp_path, f"test={tmp_path}/test.jsonl")


# ---- what it begins with ---------------------------------------------------------------------------------------------


def tuned(tmp_path, labels: list[str]):
    """A model that was fine-tuned to tell these labels apart."""
    made = [{"text": row["text"], "label": labels[i % len(labels)]} for i, row in enumerate(rows(30))]
    write(tmp_path / "other.jsonl", made)
    tiny(tmp_path)  # makes the pretrained model
    return run(tiny(tmp_path, f"train={tmp_path}/other.jsonl", "steps=1", "validation=0"), tmp_path / "tuned").output


def test_a_fine_tuned_model_goes_on_with_its_own_classes(tmp_path):
    path = tuned(tmp_path, ["good", "bad", "mixed"])
    ours = prepared(tmp_path, f"model={path}")
    assert ours.task.labels == ("bad", "good", "mixed")  # the rows have two of them
    before = Transformer.from_pretrained(path / "model")
    assert torch.equal(ours.transformer.heads["classification"].out.weight, before.heads["classification"].out.weight)
    again = prepared(tmp_path, f"model={path / 'model'}", "labels=[good, bad, mixed]")
    assert again.task.labels == ("bad", "good", "mixed")


def test_classes_that_the_model_does_not_know_are_named(tmp_path):
    path = tuned(tmp_path, ["happy", "sad", "good"])
    with pytest.raises(
        ValueError, match=r"knows the classes good, happy, sad; the rows have bad besides; fresh_head: tr"
    ):
        prepared(tmp_path, f"model={path}")
    fresh = prepared(tmp_path, f"model={path}", "fresh_head=true")
    assert fresh.task.labels == ("bad", "good") and fresh.transformer.config.labels == ("bad", "good")
    assert fresh.transformer.heads["classification"].out.weight.shape == (2, 16)
    before = Transformer.from_pretrained(path / "model")
    assert torch.equal(fresh.transformer.words.weight, before.words.weight)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_fresh_head_keeps_all_other_weights(tmp_path, layers):
    path = tuned(tmp_path, ["happy", "sad", "good"])
    with pytest.raises(ValueError, match=r"fields: with them .* other weights than the pretrained one, such as enc"):
        prepared(tmp_path, f"model={path}", "fresh_head=true", f"fields={{n_layers: {layers}}}")


def test_classes_without_names_must_be_as_many(tmp_path):
    pretrained(tmp_path / "hugging", objectives=["classification"], classifier="pooled", pooler="cls_tanh", n_labels=3)
    with pytest.raises(ValueError, match=r"has a head of 3 classes, the rows have 2: bad, good"):
        prepared(tmp_path, f"model={tmp_path}/hugging")


def test_a_new_model(tmp_path):
    tiny(tmp_path)
    fields = f"{{preset: bert-tiny, d_model: 16, d_ff: 32, n_heads: 2, max_positions: 20, tokenizer: {tmp_path}/base}}"
    ours = prepared(tmp_path, f"model={fields}", "max_length=null")
    assert (ours.task.max_length, ours.transformer.config.vocab_size) == (20, ours.tokenizer.vocab_size)
    assert ours.transformer.config.n_labels == 2


def test_a_model_in_bfloat16_is_trained_in_float32(tmp_path):
    tiny(tmp_path)
    Transformer.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    assert {p.dtype for p in prepared(tmp_path).transformer.parameters()} == {torch.float32}


def test_a_learning_rate_that_follows_the_steps(tmp_path):
    ours = prepared(tmp_path, "steps=20", "schedule.warmup=0.2", "optimizer.lr=1.0")
    rates = [ours.rate(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[-1] == 0.0
    with pytest.raises(ValueError, match=r"schedule.warmup \(30\) must be at most the run's steps \(20\)"):
        prepared(tmp_path, "steps=20", "schedule.warmup=30")


@pytest.mark.parametrize("epochs, steps", [(2.0, 2), (1.0, 1), (0.3, 0.3)])
def test_epochs_are_counted_in_steps(tmp_path, epochs, steps):
    ours = prepared(tmp_path, f"epochs={epochs}", "steps=null")
    once = ours.batches.steps_per_epoch
    assert ours.steps == pytest.approx(steps * once, abs=1)
    assert ours.batches[ours.steps - 1].progress == pytest.approx(epochs, abs=1 / once)
    assert ours.batches[ours.steps - 1].progress >= epochs


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, sentence",
    {
        "task=clasification": "task: 'clasification' is not one of classification",
        "model=nowhere": "nowhere",
        "max_length=64 data.batch_tokens=64": "max_length (64) must be at most what the model reads, 32 tokens",
        "labels=[good]": "train.jsonl, line 1: label is 'bad'; expected one of good",
        "options={problm: multi}": "no option problm; options: problem, threshold",
        "fields={n_labels: 4}": "fields.n_labels is decided by task 'classification'; leave it out",
        "fields={dropuot: 0.1}": "fields.dropuot is no field of a model (did you mean dropout?)",
        "epochs=2": "epochs (2) and steps (8) are both given; choose one",
        "validation=0.7": "validation",
        "validation={a: 1}": "validation",
        "train=[]": "train is empty",
        "train=nowhere.jsonl": "nowhere.jsonl does not exist",
        "test=elsewhere.jsonl": "elsewhere.jsonl does not exist",
        "patience=2 validation=0": "patience needs evaluations, but validation is 0",
        "data.batch_tokens=8": "data.batch_tokens (8) must be at least max_length (16)",
        "fgm=0.1 lora={r: 2}": "fgm moves the word embedding along its gradient, but lora freezes it",
        "fgm=-1": "fgm: must be greater than or equal to 0, got -1",
        "ema={decay: 1.0}": "ema.decay: must be less than 1, got 1.0",
        "lora={rank: 2}": "lora.rank is not a field; fields of lora: r, alpha, dropout, targets",
        "optimizer.layer_decay=1.5": "optimizer.layer_decay: must be less than or equal to 1, got 1.5",
        "every.evaluate=epochs": "every.evaluate",
        "teacher=nowhere": "nowhere",
        "model={preset: bert-tiny}": "model.tokenizer is missing",
        "model={preset: bert-tiny, tokenizer: x, n_head: 2}": "model.n_head is not a field (did you mean n_heads?)",
        "model={tokenizer: x} lora={r: 2}": "lora adapts a pretrained model",
    }.items(),
)
def test_sentences(tmp_path, override, sentence):
    overrides = re.split(r" (?=[\w.]+=)", override)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
        prepared(tmp_path, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_config_survives_its_file(tmp_path):
    config = tiny(tmp_path, "lora={r: 2}", "ema={decay: 0.9}", "columns={text: a}", "validation=[a, b]", "epochs=1.5",
                  "steps=null")  # fmt: skip
    config.to_file(tmp_path / "config.yaml")
    assert FinetuneConfig.from_file(tmp_path / "config.yaml") == config
    assert config.changed(tiny(tmp_path, *("keep=9", "device=cpu", "test=x", "data.workers=1"))) != []
    assert tiny(tmp_path).changed(tiny(tmp_path, "keep=9", "device=cpu", "test=x", "data.workers=1")) == []
    assert tiny(tmp_path).changed(tiny(tmp_path, "every.evaluate=3")) == ["every.evaluate"]
    constant = ("schedule.kind=constant", "schedule.warmup=2")
    assert tiny(tmp_path, *constant).changed(tiny(tmp_path, *constant, "steps=20")) == []
    assert tiny(tmp_path, constant[0]).changed(tiny(tmp_path, constant[0], "steps=20")) == ["steps"]


def test_without_epochs_or_steps_there_are_three_epochs():
    config = FinetuneConfig.from_dict({"task": "classification", "model": "x", "train": "y"})
    assert (config.epochs, config.steps, config.validation, config.every.evaluate) == (3.0, None, 0.1, "epoch")


def test_losses_of_their_own_kind_are_not_compared(tmp_path):
    tiny(tmp_path)
    pretrained(tmp_path / "gpt", "gpt-tiny", objectives=["clm"])
    pairs = [{"prompt": "the day was", "chosen": "fine", "rejected": "dull"}] * 6
    write(tmp_path / "train.jsonl", pairs)
    with pytest.raises(
        ValueError, match="r_drop compares what models say, but task 'preference' has a loss of its own"
    ):
        prepared(tmp_path, "task=preference", f"model={tmp_path}/gpt", "r_drop=1.0", "max_length=32")
