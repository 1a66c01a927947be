"""Runs whose texts are read in streams: what they remember is bounded, saved, used, and evaluation's is another."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmengine.training import RunConfig
from llmengine.training import checkpoint as checkpoints
from llmengine.training.memory import StreamMemory
from llmengine.training.pretraining import Pretraining
from llmengine.training.run import Folder
from tests.training.runs import Crash, crash, outcome, run, tiny

CPU = torch.device("cpu")


def remembered(folder) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.paths(folder / "checkpoints")[-1] / "memory.safetensors")


def test_memory_is_saved_and_bounded(tmp_path):
    run(tiny(tmp_path, "plm"), tmp_path / "run")
    kept = remembered(tmp_path / "run")
    assert 2 <= len(kept) <= 2 * 64 // 32, "a stream for each row of a step"
    assert {tensor.shape[1] for tensor in kept.values()} <= {12, 20}
    assert any(tensor.shape[1] == 20 for tensor in kept.values()), "of two reuse parts, cut to the last 20"
    assert all(tensor.shape[::2] == (2, 16) for tensor in kept.values())


def test_a_resumed_run_goes_on_with_what_was_remembered(tmp_path):
    """Another memory in the checkpoint, and the run ends otherwise: it is read, and it matters."""
    config = tiny(tmp_path, "plm")
    run(config, tmp_path / "whole")
    for name, forget in (("kept", False), ("changed", True)):
        with pytest.raises(Crash):
            run(config, tmp_path / name, 5, crash)
        if forget:
            path = checkpoints.paths(tmp_path / name / "checkpoints")[-1]
            saved, step = checkpoints.read(path), checkpoints.step_of(path)
            groups = {group: saved.tensors(group) for group in ("model", "optimizer", "memory")}
            groups["memory"] = {stream: torch.zeros_like(tensor) for stream, tensor in groups["memory"].items()}
            checkpoints.save(path.parent, step, groups, saved.facts)
        run(config, tmp_path / name, resume=True)
    assert outcome(tmp_path / "kept") == outcome(tmp_path / "whole") != outcome(tmp_path / "changed")


def test_memory_changes_what_is_learnt(tmp_path):
    losses = set()
    for memory in (0, 1, 20):
        options = [f"data.options.memory={memory}", "steps=4"]
        run(tiny(tmp_path, "plm", *options), tmp_path / str(memory))
        losses.add(outcome(tmp_path / str(memory))["records"][-1]["losses"]["plm"])
    assert len(losses) == 3


def test_evaluation_has_a_memory_of_its_own(tmp_path):
    """It is the mean over texts that are read one after another, whatever training remembers; training's stays."""
    ours = Pretraining.prepare(tiny(tmp_path, "plm"), Folder(tmp_path / "run"), CPU)
    assert ours.held_out is not None and ours.memory is not None
    first = ours.evaluate()
    ours.gradients(ours.batches[0], 0)
    before = {name: tensor.clone() for name, tensor in ours.memory.state().items()}
    assert before and ours.evaluate() == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.memory.state().items())
    total, alone, labels, memory = 0.0, 0.0, 0, StreamMemory()
    ours.model.eval()
    with torch.no_grad():
        for i in range(ours.held_out.steps_per_epoch):
            step = ours.held_out[i]
            for micro, parts in zip(step.micro_batches, step.streams, strict=True):
                total += float(memory.call(ours.model, micro, parts, num_items_in_batch=1).loss)
                alone += float(ours.model(**micro, num_items_in_batch=1).loss)
                labels += len(micro["labels"])
    assert first["losses"]["plm"] == pytest.approx(total / labels, rel=1e-6)
    assert first["losses"]["plm"] != pytest.approx(alone / labels, rel=1e-6)


def test_the_model_knows_its_memory(tmp_path):
    config = tiny(tmp_path, "plm")
    shape = config.transformer(300, pad_id=0, bos_id=1, eos_id=2)
    assert (shape.memory_length, shape.memory_reuse) == (20, 12)
    run(config, tmp_path / "run")
    from transformers import XLNetLMHeadModel

    saved = XLNetLMHeadModel.from_pretrained(tmp_path / "run" / "model").config
    assert (saved.mem_len, saved.reuse_len) == (20, 12)


def test_a_damaged_memory_is_noticed(tmp_path):
    run(tiny(tmp_path, "plm", "steps=3"), tmp_path / "run")
    path = checkpoints.paths(tmp_path / "run" / "checkpoints")[-1]
    save_file({name: tensor + 1 for name, tensor in remembered(tmp_path / "run").items()}, path / "memory.safetensors")
    with pytest.raises(checkpoints.Unreadable, match=r"memory\.safetensors is damaged"):
        checkpoints.read(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.options.reuse=0"], r"memory \(20\) is of the reuse part of earlier texts; give reuse too"),
        (["data.options.memory=-2"], "memory must be 0 or more, got -2"),
        (["model.memory_length=8"], "model.memory_length is 8, but data.options say 20; leave it out"),
        (["model.memory_reuse=8"], "model.memory_reuse is 8, but data.options say 12; leave it out"),
    ],
)
def test_configs_that_contradict_themselves(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, "plm", *overrides)


def test_without_memory_nothing_changes(tmp_path):
    config: RunConfig = tiny(tmp_path, "plm", "data.options.memory=0", "steps=3")
    ours = Pretraining.prepare(config, Folder(tmp_path / "run"), CPU)
    assert ours.memory is None and ours.batches[0].streams is None
    run(config, tmp_path / "run")
    assert not (checkpoints.paths(tmp_path / "run" / "checkpoints")[-1] / "memory.safetensors").exists()
