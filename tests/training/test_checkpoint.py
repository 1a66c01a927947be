"""Checkpoints: whole or not there, whatever happens to the process, the disk or the files."""

from __future__ import annotations

import errno
import random
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from llmengine.convert import files
from llmengine.training import checkpoint, train
from llmengine.training.files import exclusive
from tests.training.runs import At, outcome, run, tiny

GROUPS = {"model": {"a": torch.arange(100.0), "b": torch.ones(3, 4)}, "optimizer": {"step.a": torch.tensor(7.0)}}
FACTS = {"tokens": 12, "config": {"seed": 1}}


def saved(directory: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(directory, step, GROUPS, FACTS) for step in steps]


def test_what_was_saved_comes_back(tmp_path):
    (path,) = saved(tmp_path / "c", 12)
    assert path.name == "step-000012" and [p.name for p in (tmp_path / "c").iterdir()] == ["step-000012"]
    back = checkpoint.newest(tmp_path / "c", pytest.fail)
    assert (back.step, back.facts) == (12, FACTS)
    for name, tensors in GROUPS.items():
        torch.testing.assert_close(back.tensors(name), tensors, rtol=0, atol=0)


def test_the_newest_ones_stay(tmp_path):
    saved(tmp_path, 999_999, 2, 1_000_000, 30)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    checkpoint.prune(tmp_path, 5)
    assert len(checkpoint.paths(tmp_path)) == 2


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    saved(tmp_path, 3)
    checkpoint.save(tmp_path, 3, {"model": {"a": torch.zeros(1)}}, {"tokens": 1})
    assert checkpoint.newest(tmp_path, pytest.fail).facts == {"tokens": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda path: flip(path / "model.safetensors"),
    "a truncated file": lambda path: (path / "optimizer.safetensors").write_bytes(b"\0" * 8),
    "a missing file": lambda path: (path / "optimizer.safetensors").unlink(),
    "no manifest": lambda path: (path / "state.json").unlink(),
    "half a manifest": lambda path: (path / "state.json").write_text((path / "state.json").read_text()[:40]),
    "a manifest of zeros": lambda path: (path / "state.json").write_bytes(b"\0" * 100),
    "another manifest": lambda path: (path / "state.json").write_text("[1, 2]"),
    "a changed manifest": lambda path: (path / "state.json").write_text(
        (path / "state.json").read_text().replace('"tokens": 12', '"tokens": 13')
    ),
    "another step's name": lambda path: path.rename(path.with_name("step-000009")),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    _, path = saved(tmp_path, 1, 2)
    DAMAGE[damage](path)
    notices: list[str] = []
    assert checkpoint.newest(tmp_path, notices.append).step == 1
    assert len(notices) == 1 and "skipped" in notices[0]
    shutil.rmtree(tmp_path / "step-000001")
    with pytest.raises(checkpoint.Unreadable, match=r"no checkpoint in .* is whole"):
        checkpoint.newest(tmp_path, notices.append)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Any bit of any file: the checkpoint is refused, or, where JSON does not care, reads the same."""
    (path,) = saved(tmp_path, 1)
    draw = random.Random(0)
    refused = 0
    for _ in range(600):
        file = draw.choice(sorted(path.iterdir()))
        whole = file.read_bytes()
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        try:
            back = checkpoint.read(path)
            assert file.name == "state.json" and (back.step, back.facts) == (1, FACTS)
        except checkpoint.Unreadable:
            refused += 1
        file.write_bytes(whole)
    assert refused > 400


def test_a_run_goes_on_before_a_damaged_checkpoint(tmp_path):
    config = tiny(tmp_path)
    run(config, tmp_path / "whole")
    run(config, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "step-000008" / "model.safetensors")
    watcher = At()
    train(config, tmp_path / "run", resume=True, observers=[watcher])
    assert any("step-000008 is skipped" in notice for notice in watcher.notices)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_earlier_checkpoints_and_says_what_to_do(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    run(config, tmp_path / "whole")

    def full(tensors, path, **options):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=r"the disk is full.*Free some space.*resume") as caught:
        run(config, tmp_path / "run", 4, lambda: monkeypatch.setattr(files, "save_file", full))
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    monkeypatch.undo()
    run(config, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@contextmanager
def largest_file(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_operating_system_refuses_is_an_oserror(tmp_path):
    """A real refusal, through safetensors: no file may be larger than 64 KiB."""
    saved(tmp_path, 1)
    with largest_file(1 << 16), pytest.raises(OSError, match=r"model\.safetensors") as caught:
        checkpoint.save(tmp_path, 2, {"model": {"a": torch.zeros(1 << 20)}}, FACTS)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    script = "import sys; from pathlib import Path; from llmengine.training.files import exclusive\n"
    script += f"with exclusive(Path({str(tmp_path / '.lock')!r})): pass"
    command = [sys.executable, "-W", "ignore", "-c", script]
    with exclusive(tmp_path / ".lock"):
        second = subprocess.run(command, capture_output=True, text=True)
    assert "BlockingIOError" in second.stderr and "another process trains in this folder" in second.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0
