"""Fine-tuning as a run: rows, task, model, what it is trained with, and how it is judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module

from llmengine.data.batches import Step, StepBatches
from llmengine.metrics import Judgement
from llmengine.models import Transformer
from llmengine.nn import keep_fp8_weights
from llmengine.objectives.distillation import Distilled
from llmengine.tasks import Answer, Row, Task
from llmengine.training import lora, report, starting
from llmengine.training.evaluation import mean_losses, without_dropout
from llmengine.training.finetune_config import FinetuneConfig
from llmengine.training.finetune_data import TrainingRows
from llmengine.training.flops import training_flops
from llmengine.training.metrics import Record
from llmengine.training.optimizer import adamw
from llmengine.training.regularisers import Ema, Fgm, Neftune, RDrop
from llmengine.training.run import Folder, Run
from llmengine.training.selection import Selection
from llmengine.training.streams import INITIAL_WEIGHTS, reseed

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(kw_only=True)
class Finetuning(Run):
    config: FinetuneConfig
    task: Task
    transformer: Transformer
    """Who answers."""
    measured: Module
    """The transformer, as the task wraps it: whose held-out loss is measured."""
    rows: TrainingRows
    adapters: PeftModel | None

    @classmethod
    def prepare(
        cls, config: FinetuneConfig, folder: Folder, device: torch.device, notice: Callable[[str], None]
    ) -> Finetuning:
        """Reads and makes everything; writes nothing."""
        rows = TrainingRows.read(config, notice)
        reseed(config.seed, INITIAL_WEIGHTS)
        start = starting.make(config, rows.given)
        task, transformer = start.task, start.transformer
        adapters = None if config.lora is None else lora.adapt(transformer, config.lora)
        measured = task.wrap(transformer).to(device)
        model = _trained(config, start, measured)
        batches = _batches(config, task, rows.train, shuffle=True)
        steps = batches.steps_of(config.epochs) if config.steps is None else config.steps  # type: ignore[arg-type]
        selection = None
        if rows.held_out:
            selection = Selection(folder.best, patience=config.patience, min_delta=config.min_delta)
        keep_fp8_weights(model, config.data.accumulation > 1)
        run = cls(
            config=config,
            title=config.task,
            steps=steps,
            schedule=config.schedule.over(steps),
            folder=folder,
            device=device,
            tokenizer=task.tokenizer,
            model=model,
            optimizer=adamw(model, config.optimizer, config.optimizer.layer_decay),
            batches=batches,
            digest=rows.digest(config, builds_on_model=measured is not transformer or adapters is not None),
            source="the rows (or the weights that it builds on)",
            selection=selection,
            noise=Neftune(transformer, config.neftune) if config.neftune else None,
            adversary=Fgm(transformer.words, config.fgm) if config.fgm else None,
            average=None if config.ema is None else Ema(model, config.ema.decay, warmup=config.ema.warmup),
            task=task,
            transformer=transformer,
            measured=measured,
            rows=rows,
            held_out=_batches(config, task, rows.held_out, shuffle=False) if rows.held_out else None,
            adapters=adapters,
        )
        run._check_judging()
        return run

    def begin(self) -> None:
        super().begin()
        self.task.save(self.folder.model)

    # ---- while training ----------------------------------------------------------------------------------------------

    def flops(self, batch: Step) -> int:
        """Of one pass: R-Drop's second one, an adversary's and a teacher's come on top."""
        return training_flops(self.transformer.config, batch.micro_batches, batch.items.get("tokens", 0))

    def evaluate(self) -> Record | None:
        if self.held_out is None:
            return None
        with self._measuring():
            loss, losses = mean_losses(self.measured, self.held_out, self.device)
        judgement = self.judge(self.rows.held_out)
        name, lower = self._selected(judgement)
        scores = _values(judgement)
        record: Record = {"loss": loss, "losses": losses, "scores": scores}
        if (head := self.transformer.config.token_task) in losses and "perplexity" not in scores:
            record["perplexity"] = math.exp(min(losses[head], 700))
        return {**record, "select": name, "lower_is_better": lower}

    def judge(self, rows: list[Row]) -> Judgement:
        """The model's answers beside the rows' own."""
        return self.task.judge(rows, self._answers(rows))

    def _answers(self, rows: list[Row]) -> list[Answer]:
        with self._measuring():
            return list(self.task.answers(self.transformer, rows, batch_tokens=self.config.data.batch_tokens))

    def _measuring(self) -> AbstractContextManager:
        return without_dropout(self.model, self.device, self.config.precision)

    def _selected(self, judgement: Judgement) -> tuple[str, bool]:
        """The score that selects, and whether less of it is better."""
        select = self.config.select
        if select is None or select == judgement.main:
            return judgement.main, judgement.lower_is_better
        name = select.removeprefix("-")
        if name != "loss" and name not in judgement.scores:
            raise ValueError(f"select: {select!r} is not a score of task {self.task.name!r}; "
                             f"scores: loss, {', '.join(judgement.scores)}")  # fmt: skip
        return name, name == "loss" or select.startswith("-")

    def _check_judging(self) -> None:
        """Before any training: rows can be judged, and the task has the score that selects."""
        if self.rows.test:
            self.judge(self.rows.test[:1])
            self.task.foresee(self.rows.test)
        if self.config.select not in (None, "loss", "-loss"):
            self._selected(self.judge(self.rows.held_out[:2]))

    # ---- weights -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """With adapters only what is trained: the rest is in the model's own directory."""
        state = super().state()
        if self.adapters is None:
            return state
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        missing = [] if self.adapters is not None else missing
        if missing or unexpected:
            raise ValueError(f"the checkpoint is of another model: {', '.join([*missing, *unexpected][:3])}, …")

    def finish(self, whole: bool) -> Judgement | None:
        directory = self.folder.model
        if self.adapters is not None:
            self.adapters.save_pretrained(str(self.folder.adapter), save_embedding_layers=False)
            self.transformer = self.adapters.merge_and_unload()
        self.transformer.eval().save_pretrained(directory)
        self.task.save(directory)
        if self.config.test is None or not whole:
            return None
        rows = self.rows.test
        answers = self._answers(rows)
        judgement = self.task.judge(rows, answers)
        files = [self.config.test] if isinstance(self.config.test, str) else self.config.test
        account = report.of_run(self.folder.path, self.task, files, self.config)
        report.write(self.folder.evaluation, judgement, rows, answers, asked=self.task.asked, **account)
        return judgement


def _trained(config: FinetuneConfig, start: starting.Start, measured: Module) -> Module:
    """The module that is called in training: what is measured, and what distillation and R-Drop put around it."""
    transformer, model = start.transformer, measured
    for name, asked in (("r_drop", config.r_drop), ("teacher", config.teacher)):
        if asked and measured is not transformer:
            raise ValueError(f"{name} compares what models say, but task {config.task!r} has a loss of its own kind")
    if start.teacher is not None:
        teacher = start.teacher.to(transformer.words.weight.device)
        model = Distilled(measured, transformer, teacher, order=start.order, **config.distill.model_dump())
    return RDrop(model, transformer, config.r_drop) if config.r_drop else model


def _batches(config: FinetuneConfig, task: Task, rows: list[Row], *, shuffle: bool) -> StepBatches:
    data = config.data
    return StepBatches(
        task.examples(rows, seed=config.seed), batch_tokens=data.batch_tokens,
        accumulation=data.accumulation if shuffle else 1, seed=config.seed, shuffle=shuffle,
    )  # fmt: skip


def _values(judgement: Judgement) -> dict[str, float | None]:
    """None: a score of these rows is not defined. JSON has no NaN."""
    values = {name: score.value for name, score in judgement.scores.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
