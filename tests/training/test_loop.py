"""What a run learns, writes and refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers

import llmengine
from llmengine.optim import AdamW
from llmengine.training import Diverged, Observer, RunConfig, train
from llmengine.training.evaluation import evaluate
from llmengine.training.gradients import accumulate
from llmengine.training.optimizer import adamw, clipping, learning_rate
from llmengine.training.pretraining import Pretraining
from llmengine.training.run import Folder
from tests.training.runs import At, Crash, crash, merged, run, tiny

CPU = torch.device("cpu")


def prepared(tmp_path, objective: str, *overrides: str) -> Pretraining:
    return Pretraining.prepare(tiny(tmp_path, objective, *overrides), Folder(tmp_path / "run"), CPU)


@pytest.mark.parametrize("objective, least", [("clm", 2.0), ("mlm", 1.0), ("bert", 1.0)])
def test_the_held_out_loss_falls(tmp_path, objective, least):
    result = run(tiny(tmp_path, objective, "steps=60", "every.evaluate=1000"), tmp_path / "run")
    head = "clm" if objective == "clm" else "mlm"
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model"))
    assert result.evaluation["losses"][head] < math.log(vocabulary) - least
    assert result.evaluation["perplexity"] == pytest.approx(math.exp(result.evaluation["losses"][head]))


def test_the_model_folder_is_hugging_faces(tmp_path):
    run(tiny(tmp_path, "clm"), tmp_path / "run")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    ours = llmengine.Transformer.from_pretrained(tmp_path / "run" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = tokenizer("The cat chases", return_tensors="pt").input_ids
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def unequal(micro_batches: list[dict]) -> bool:
    labels = {int((batch["labels"] != -100).sum()) for batch in micro_batches}
    return len(micro_batches) == 4 and len(labels) > 1


@pytest.mark.parametrize("objective", ["clm", "mlm", "bert"])
def test_four_micro_batches_train_as_one(tmp_path, objective):
    """Losses and gradients are equal, though the micro-batches have different numbers of labels."""
    no_dropout = ("model.dropout=0.0", "model.embed_dropout=0.0", "model.attention_dropout=0.0")
    batches = prepared(tmp_path, objective, "data.accumulation=4").batches
    step = next(step for step in map(batches.__getitem__, range(40)) if unequal(step.micro_batches))
    results = []
    for batch in (step, merged(step)):
        ours = prepared(tmp_path, objective, *no_dropout)
        losses = accumulate(ours.model.train(), batch, CPU, "fp32")
        results.append((losses, {name: p.grad for name, p in ours.model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_records(tmp_path):
    watcher = At()
    train(tiny(tmp_path, "bert", "every.log=3"), tmp_path / "run", observers=[watcher])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kinds = [(record["kind"], record["step"]) for record in records]
    assert kinds == [("train", 3), ("evaluation", 4), ("train", 6), ("train", 8), ("evaluation", 8)]
    first = records[0]
    assert first["loss"] == pytest.approx(sum(first["losses"].values())) and set(first["losses"]) == {"mlm", "nsp"}
    assert first["tokens"] <= 3 * 2 * 64 and first["tokens"] < records[2]["tokens"]
    assert all(first[name] > 0 for name in ("tokens_per_second", "flops_per_second", "seconds", "grad_norm", "lr"))
    assert set(records[1]["accuracy"]) == {"mlm", "nsp"}


def test_evaluation_equals_a_plain_loop(tmp_path):
    ours = prepared(tmp_path, "bert")
    result = evaluate(ours.model.train(), ours.held_out, CPU, "fp32")
    assert ours.model.training
    ours.model.eval()
    negative_log, right, count = 0.0, 0, 0
    for index in range(len(ours.held_out.examples)):
        example = ours.held_out.examples[0, index]
        with torch.no_grad():
            logits = ours.model(example["input_ids"][None], token_type_ids=example["token_type_ids"][None]).logits[0]
        labelled = example["labels"] != -100
        chances = logits[labelled].double().log_softmax(-1)
        negative_log -= float(chances.gather(1, example["labels"][labelled][:, None]).sum())
        right += int((chances.argmax(-1) == example["labels"][labelled]).sum())
        count += int(labelled.sum())
    assert result["losses"]["mlm"] == pytest.approx(negative_log / count, rel=1e-5)
    assert result["accuracy"]["mlm"] == right / count


@pytest.mark.parametrize(
    "spoiled, sentence",
    [(5, r"step 6: clm nan, gradient norm nan: .*step-000003"), (4, r"step 4: held-out clm nan: .*step-000003")],
)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, spoiled, sentence):
    class Spoil(Observer):
        def recorded(self, run, record):
            if record["step"] == spoiled:
                torch.nn.init.constant_(run.model.stack.final_norm.weight, math.nan)

    config = tiny(tmp_path, "clm")
    with pytest.raises(Diverged, match=sentence):
        train(config, tmp_path / "run", observers=[Spoil()])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert run(config, tmp_path / "run", resume=True).step == 8


def test_an_observer_sees_the_end_also_of_a_failed_run(tmp_path):
    closed = []
    watcher = At(2, crash)
    watcher.closed = lambda: closed.append(True)
    with pytest.raises(Crash):
        train(tiny(tmp_path), tmp_path / "run", observers=[watcher])
    assert closed == [True]


# ---- optimizer -------------------------------------------------------------------------------------------------------


def test_schedules():
    def rates(kind: str, steps: int = 11, warmup: int = 4) -> list[float]:
        fields = {"corpus": "austen", "objective": "clm", "model": {"preset": "gpt-tiny"}, "steps": steps}
        schedule = {"kind": kind, "warmup": warmup, "final": 0.25}
        config = RunConfig.from_dict({**fields, "optimizer": {"lr": 2.0}, "schedule": schedule})
        return [learning_rate(config.optimizer.lr, config.schedule, step, steps) for step in range(steps)]

    rise = [0.5, 1.0, 1.5, 2.0]
    assert rates("constant") == [*rise, *[2.0] * 7]
    assert rates("linear") == pytest.approx([*rise, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5])
    cosine = rates("cosine")
    assert (
        cosine[:5] == pytest.approx([*rise, 2.0])
        and cosine[7] == pytest.approx(1.25)
        and cosine[10] == pytest.approx(0.5)
    )
    assert cosine[4:] == sorted(cosine[4:], reverse=True)
    assert rates("linear", 1, 0) == [2.0] and rates("cosine", 3, 3) == pytest.approx([2 / 3, 4 / 3, 2.0])


def test_only_matrices_decay(tmp_path):
    ours = prepared(tmp_path, "bert")
    names = {id(p): name for name, p in ours.model.named_parameters()}
    decayed, others = (
        {names[id(p)] for p in group["params"]} for group in adamw(ours.model, ours.config.optimizer).param_groups
    )
    assert decayed | others == set(names.values()) and not decayed & others
    assert {name for name in others if name.endswith("weight")} == {
        name for name in names.values() if name.endswith("weight") and ("norm" in name or "embeddings" in name)
    }
    assert "encoder.layers.0.attention.qkv.weight" in decayed


def test_clipping():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert clipping(gradients, None) == clipping(gradients, 6.0) == (torch.tensor(5.0), None)
    norm, scale = clipping(gradients, 1.0)
    assert (float(norm), float(scale)) == (5.0, pytest.approx(0.2))
    norm, scale = clipping([torch.tensor([float("nan")])], 1.0)
    assert math.isnan(float(norm)) and scale is None


def test_a_clipped_step_is_one_on_scaled_gradients():
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2)]
    optimizers = [AdamW([weight], 1e-2, eps=1.0) for weight in weights]
    for weight in weights:
        weight.grad = torch.linspace(-3, 5, 50)
    _, scale = clipping([weights[0].grad], 1.0)
    optimizers[0].step(gradient_scale=scale)
    torch.nn.utils.clip_grad_norm_([weights[1]], 1.0)
    optimizers[1].step()
    torch.testing.assert_close(weights[0], weights[1])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    config = tiny(tmp_path, "clm", "steps=1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"run is not empty; give another folder$"):
        train(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train(config, tmp_path / "run", resume=True)
    with pytest.raises(FileExistsError, match="is a file"):
        train(config, tmp_path / "run" / "thesis.txt")
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(FileExistsError, match="give another folder, or go on with the run that is there: --resume"):
        train(config, tmp_path / "run")


def test_a_run_that_could_not_begin_leaves_its_folder_free(tmp_path):
    broken = tiny(tmp_path, "clm", f"corpus={tmp_path}/nowhere.txt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(broken, tmp_path / "run")
    assert run(tiny(tmp_path, "clm", "steps=1"), tmp_path / "run").step == 1


def test_resuming_with_another_config_is_refused(tmp_path):
    run(tiny(tmp_path), tmp_path / "run")
    for override, sentence in {
        "optimizer.lr=0.02": "optimizer.lr is 0.02, was 0.01",
        "model.d_model=32": "model.d_model is 32, was 16",
        "seed=9": "seed is 9, was 3",
        "steps=9": "steps is 9, was 8",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            run(tiny(tmp_path, "clm", override), tmp_path / "run", resume=True)
    free = ("keep=5", "every.save=1", "every.evaluate=2", "data.workers=1")
    assert run(tiny(tmp_path, "clm", *free), tmp_path / "run", resume=True).step == 8


def test_a_constant_schedule_may_go_on_for_longer(tmp_path):
    constant = ("schedule.kind=constant", "schedule.warmup=2")
    run(tiny(tmp_path, "clm", *constant, "steps=4"), tmp_path / "run")
    assert run(tiny(tmp_path, "clm", *constant, "steps=6"), tmp_path / "run", resume=True).step == 6


def test_resuming_with_another_corpus_is_refused(tmp_path):
    config = tiny(tmp_path)
    run(config, tmp_path / "run")
    with (tmp_path / "corpus.txt").open("a") as file:
        file.write("\n\nOne more paragraph.")
    with pytest.raises(ValueError, match="no longer those that the run began with"):
        run(config, tmp_path / "run", resume=True)


def test_a_finished_run_resumes_to_its_end(tmp_path):
    first = run(tiny(tmp_path), tmp_path / "run")
    again = run(tiny(tmp_path), tmp_path / "run", resume=True)
    assert (again.step, again.evaluation) == (first.step, first.evaluation)
