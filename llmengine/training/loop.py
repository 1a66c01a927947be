"""The training loop: steps, records, evaluations and checkpoints, so that a resumed run goes on bit for bit.

Everything that a step computes is a function of the config, the step's number and the state before it: batches are
drawn by number, dropout's generator is seeded by number, the learning rate is a formula of it. What is left to save is
weights, optimizer state and a few counters.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llmengine.data.batches import Step, loader
from llmengine.data.examples import tokens_of
from llmengine.metrics import Judgement
from llmengine.training import checkpoint, metrics
from llmengine.training.config import RunConfig
from llmengine.training.files import exclusive
from llmengine.training.finetune_config import FinetuneConfig
from llmengine.training.finetuning import Finetuning
from llmengine.training.interrupt import StopRequest
from llmengine.training.metrics import Metrics, Record
from llmengine.training.observer import Observer, Observers
from llmengine.training.optimizer import clipping, load_state_tensors, state_tensors
from llmengine.training.pretraining import Pretraining
from llmengine.training.run import Folder, Run, pick_device, surroundings
from llmengine.training.sections import Config
from llmengine.training.selection import Best
from llmengine.training.streams import TRAINING_STEP, reseed


class Diverged(RuntimeError):
    """The loss or the gradients are no longer finite; weights and checkpoints are as they were before that step."""


@dataclass(frozen=True)
class Result:
    output: Path
    step: int
    """Steps done."""
    interrupted: str | None
    """The signal that ended the run early."""
    evaluation: Record | None
    """The last one."""
    checkpoint: Path | None
    """The newest one."""
    best: Best | None = None
    """The evaluation whose weights remain, where the run selects by a score."""
    test: Judgement | None = None
    """How the model does on the rows that it is tested with."""


def train(
    config: RunConfig | FinetuneConfig, output: str | Path, *, resume: bool = False, observers: Sequence[Observer] = ()
) -> Result:
    """Pretrains or fine-tunes a model as `config` says, in the folder `output`, which must be empty or not there.

    resume: go on at the newest whole checkpoint of `output`. `config` may differ from the one the run began with in
    fields that change nothing that is computed; another difference is an error. Losses, weights and optimizer state
    are then those of a run that was never interrupted, bit by bit, on the same machine with as many threads.

    SIGINT and SIGTERM: the step is finished and saved, and the result says so. Fine-tuning also ends before its last
    step where it has waited in vain for a better evaluation. Raises FileExistsError,
    FileNotFoundError, ValueError (config, corpus, checkpoints), Diverged, OSError.
    """
    folder, watchers, device = Folder(Path(output)), Observers(observers), pick_device(config.device)
    _check(folder, resume)
    gpus = [device] if device.type == "cuda" else []
    with _full_disk_explained(folder), exclusive(folder.lock), torch.random.fork_rng(gpus), StopRequest() as stop:
        saved = _saved(config, folder, watchers) if resume else None
        run: Run
        if isinstance(config, FinetuneConfig):
            run = Finetuning.prepare(config, folder, device, watchers.noticed)
        else:
            run = Pretraining.prepare(config, folder, device)
        run.begin()
        try:
            return _Loop(run, watchers, stop, saved).go()
        finally:
            watchers.closed()


def _check(folder: Folder, resume: bool) -> None:
    """That the folder is one to begin in, or to go on in; makes it."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"output {path} is a file; give a folder")
    if resume and not folder.config.is_file():
        raise FileNotFoundError(f"output {path} holds no run to resume: it has no {folder.config.name}")
    if not resume and not folder.is_empty():
        there = f", or go on with the run that is there: --resume {path}" if folder.config.is_file() else ""
        raise FileExistsError(f"output {path} is not empty; give another folder{there}")
    path.mkdir(parents=True, exist_ok=True)


def _saved(config: Config, folder: Folder, watchers: Observer) -> checkpoint.Checkpoint | None:
    """Where to go on; None: at the start."""
    saved = checkpoint.newest(folder.checkpoints, watchers.noticed)
    if saved is None:
        watchers.noticed(f"{folder.path} has no checkpoint yet: the run begins anew")
    else:
        _check_unchanged(config, type(config).from_dict(saved.facts["config"]), folder.path)
    return saved


def _check_unchanged(config: Config, before: Config, path: Path) -> None:
    changes = config.changed(before)
    if changes:
        ours, theirs = config.flat(), before.flat()
        differences = "; ".join(f"{n} is {ours.get(n)!r}, was {theirs.get(n)!r}" for n in changes)
        raise ValueError(f"cannot resume {path} with another config: {differences}; restore it, or start a new run")


class _Loop:
    def __init__(self, run: Run, watchers: Observer, stop: StopRequest, saved: checkpoint.Checkpoint | None) -> None:
        self.run = run
        self.config = run.config
        self.watchers = watchers
        self.stop = stop
        self.step = 0  # steps done
        self.tokens = 0
        self.seconds = 0.0
        self.evaluation: Record | None = None
        self.checkpoint: Path | None = None
        if saved is not None:
            self._restore(saved)
        self.records = metrics.cut(run.folder.metrics, self.step)
        self.metrics = Metrics(run.folder.metrics)
        self._since = (self.tokens, 0, self.seconds)  # tokens, FLOPs, seconds at the last record
        self.flops = 0

    @property
    def done(self) -> bool:
        """Whether the run is at its end, or has waited for a better evaluation as long as it may."""
        selection = self.run.selection
        return self.step == self.run.steps or (selection is not None and selection.over)

    def go(self) -> Result:
        run = self.run
        self.watchers.started(run, self.step, self.records)
        run.model.train()
        try:
            clock = time.perf_counter()
            last = self.step if self.done else run.steps
            for batch in loader(run.batches, self.step, last, self.config.data.workers):
                record = self._train_step(batch)
                self.step += 1
                self.seconds += time.perf_counter() - clock
                self._after_step(record)
                if self.stop.name is not None or self.done:
                    break
                clock = time.perf_counter()
            if not self._is_saved():  # a signal may come at any moment
                self._save()
        finally:
            self.metrics.close()
        return self._finish()

    def _train_step(self, batch: Step) -> Record:
        """One optimizer step; what it was like."""
        run, config = self.run, self.config
        reseed(config.seed, TRAINING_STEP, self.step)
        loss, losses = run.gradients(batch, self.step)
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        norm, scale = clipping(gradients, config.optimizer.clip_norm)
        self._check_finite(self.step + 1, **losses, gradient_norm=float(norm))
        rate = run.rate(self.step)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        run.optimizer.step(gradient_scale=scale)
        run.optimizer.zero_grad()
        if run.average is not None:
            run.average.update(self.step + 1)
        self.tokens += sum(map(tokens_of, batch.micro_batches))
        self.flops += run.flops(batch)
        return {"loss": loss, "losses": losses, "lr": rate, "grad_norm": float(norm), "epoch": batch.progress}

    def _check_finite(self, step: int, **numbers: float) -> None:
        if all(map(math.isfinite, numbers.values())):
            return
        values = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        raise Diverged(
            f"step {step}: {values}: not finite. Nothing was overwritten; the newest checkpoint is "
            f"{self.checkpoint or 'none yet'}. Resuming repeats the same steps: begin a new run with a lower "
            "optimizer.lr, a longer schedule.warmup or precision fp32"
        )

    def _after_step(self, record: Record) -> None:
        every, last = self.config.every, self.step == self.run.steps
        if self.step % every.log == 0 or last or self.stop.name:
            self._record({"kind": "train", "step": self.step, **record, **self._speed()})
        epoch_ends = record["epoch"] == int(record["epoch"])
        if last or (epoch_ends if every.evaluate == "epoch" else self.step % every.evaluate == 0):
            self._evaluate()
        if self.step % every.save == 0 or self.done:
            self._save()

    def _speed(self) -> Record:
        tokens, flops, seconds = self._since
        passed = max(self.seconds - seconds, 1e-9)
        self._since = (self.tokens, self.flops, self.seconds)
        return {
            "tokens": self.tokens,
            "tokens_per_second": (self.tokens - tokens) / passed,
            "flops_per_second": (self.flops - flops) / passed,
            "seconds": self.seconds,
        }

    def _evaluate(self) -> None:
        run = self.run
        with run.averaged():
            result = run.evaluate()
            if result is None:
                return
            self._check_finite(self.step, **{f"held-out {head}": loss for head, loss in result["losses"].items()})
            self.evaluation = {"kind": "evaluation", "step": self.step, **result}
            if run.selection is not None:
                self.evaluation["best"] = run.selection.seen(self.evaluation)
                if self.evaluation["best"]:
                    run.selection.keep(run.state())
        self._record(self.evaluation)

    def _record(self, record: Record) -> None:
        self.metrics.append(record)
        self.watchers.recorded(self.run, record)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        run = self.run
        self.metrics.sync()
        groups = {"model": run.state(), "optimizer": state_tensors(run.optimizer, run.model)}
        facts = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "evaluation": self.evaluation,
            "config": self.config.to_dict(),
            "corpus": run.digest,
            "surroundings": surroundings(run.device),
        }
        if run.average is not None:
            groups["average"] = run.average.state()
        if run.memory is not None:
            groups["memory"] = run.memory.state()
        if run.selection is not None:
            facts["selection"] = run.selection.facts()
        self.checkpoint = checkpoint.save(run.folder.checkpoints, self.step, groups, facts)
        checkpoint.prune(run.folder.checkpoints, self.config.keep)
        if run.selection is not None:
            run.selection.prune(checkpoint.step_of(checkpoint.paths(run.folder.checkpoints)[0]))

    def _is_saved(self) -> bool:
        """Whether there is a checkpoint of this step."""
        return self.checkpoint is not None and checkpoint.step_of(self.checkpoint) == self.step

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        run, facts = self.run, saved.facts
        if facts["corpus"] != run.digest:
            raise ValueError(
                f"cannot resume {run.folder.path}: {run.source} are no longer those that the run began with; "
                "restore them, or start a new run"
            )
        now = surroundings(run.device)
        if changes := [f"{k} is {now[k]}, was {v}" for k, v in facts["surroundings"].items() if now.get(k) != v]:
            self.watchers.noticed(f"results may differ in their last bits from here on: {'; '.join(changes)}")
        run.load_state(saved.tensors("model"))
        load_state_tensors(run.optimizer, run.model, saved.tensors("optimizer"))
        if run.average is not None:
            run.average.load_state(saved.tensors("average"))
        if run.memory is not None:
            run.memory.load_state(saved.tensors("memory"), run.device)
        if run.selection is not None:
            run.selection.restore(facts["selection"], saved.step)
        self.step, self.tokens, self.seconds = saved.step, facts["tokens"], facts["seconds"]
        self.evaluation, self.checkpoint = facts["evaluation"], saved.path

    def _finish(self) -> Result:
        run, interrupted = self.run, None if self.done else self.stop.name
        best = None if run.selection is None else run.selection.weights()
        with run.averaged():
            if best is not None:
                run.load_state(best)
            test = run.finish(whole=self.done)
        result = Result(run.folder.path, self.step, interrupted, self.evaluation, self.checkpoint,
                        None if run.selection is None else run.selection.best, test)  # fmt: skip
        if interrupted:
            self.watchers.noticed(f"{interrupted} after step {self.step}: saved in {self.checkpoint}; resume to go on")
        elif self.step < run.steps and run.selection is not None:
            self.watchers.noticed(f"step {self.step} is the last: {run.selection.waited} evaluations were no better")
        self.watchers.finished(run, result)
        return result


@contextmanager
def _full_disk_explained(folder: Folder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk is full; checkpoints in {folder.checkpoints} that were there are whole. Free some space "
            "(a lower `keep` needs less), then resume",
            str(folder.path),
        ) from error
