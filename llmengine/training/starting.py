"""What a fine-tuning run begins with: the task, and the model as it is before training; a teacher, if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmengine import convert, tasks
from llmengine.data.tokenizer import Tokenizer
from llmengine.models import Transformer, TransformerConfig
from llmengine.models.fine_tuning import with_heads
from llmengine.objectives.distillation import check_vocabulary
from llmengine.tasks import Row, Task
from llmengine.training.finetune_config import FinetuneConfig
from llmengine.training.pretraining import check_can_be_saved
from llmengine.training.run import model_directory

MAX_LENGTH = 256  # where none is given


@dataclass(frozen=True)
class Start:
    task: Task
    transformer: Transformer
    """On the CPU, in float32."""
    teacher: Transformer | None
    order: list[int] | None
    """Which of the teacher's outputs is each of the model's; None: the same."""


def make(config: FinetuneConfig, rows: Sequence[Row]) -> Start:
    """rows: all that the task's classes are to be found in. Raises ValueError, FileNotFoundError."""
    if isinstance(config.model, str):
        task, transformer = _pretrained(config, config.model, rows)
    else:
        task, transformer = _new(config, config.model, rows)
    shape = transformer.config
    words = min(shape.vocab_size, shape.source_vocab_size)
    if task.tokenizer.vocab_size > words:
        raise ValueError(
            f"model: its tokenizer has {task.tokenizer.vocab_size} tokens, the model itself {words}; "
            "they do not belong together"
        )
    if not shape.share_embeddings and (config.neftune or config.fgm):
        raise ValueError("neftune and fgm disturb one word embedding; this model's encoder and decoder have their own")
    try:
        check_can_be_saved(shape)
    except ValueError as error:
        where = "fields.family" if isinstance(config.model, str) else "model.family"
        raise ValueError(str(error).replace("set family to", f"set {where} to")) from None
    transformer.float()
    teacher, order = (None, None) if config.teacher is None else _teacher(config, config.teacher, task)
    return Start(task, transformer, teacher, order)


def _task(config: FinetuneConfig, tokenizer: Tokenizer, rows: Sequence[Row], longest: int | None) -> Task:
    """longest: the most tokens that the model reads; None: no limit."""
    most = min(limit for limit in (longest, config.data.batch_tokens, 2**31) if limit is not None)
    if longest is not None and config.max_length is not None and config.max_length > longest:
        raise ValueError(f"max_length ({config.max_length}) must be at most what the model reads, {longest} tokens")
    length = min(MAX_LENGTH, most) if config.max_length is None else config.max_length
    return tasks.make(config.task, tokenizer, rows, max_length=length, labels=config.labels, **config.options)


# ---- a pretrained model ----------------------------------------------------------------------------------------------


def _pretrained(config: FinetuneConfig, model: str, rows: Sequence[Row]) -> tuple[Task, Transformer]:
    directory = model_directory(model)
    tokenizer = Tokenizer.load(directory)
    known = convert.Checkpoint(directory).fields
    task = _task(config, tokenizer, rows, known.get("max_positions"))
    decided = {"objectives", *task.model_fields()} & set(config.fields)
    if decided:
        raise ValueError(f"fields.{min(decided)} is decided by task {config.task!r}; leave it out")
    old = None
    if task.objective in known["objectives"] and task.labels:
        old = Judging.of(directory, known)
        if not config.fresh_head:
            task = old.adopted_by(config, task)
    fields = {**config.fields, **task.model_fields()}
    if old is None or not config.fresh_head:
        return task, Transformer.from_pretrained(directory, objectives=[task.objective], **fields)
    return task, _with_fresh_head(Transformer.from_pretrained(directory, objectives=[task.objective]), fields)


@dataclass(frozen=True)
class Judging:
    """What the head of a fine-tuned model tells apart. labels: their names, where the directory has them."""

    directory: Path
    count: int
    labels: tuple[str, ...] | None

    @classmethod
    def of(cls, directory: Path, fields: Any) -> Judging:
        names = fields.get("labels")
        if (directory / tasks.FILE).is_file():
            names = tasks.load(directory, Tokenizer.load(directory)).labels
        return cls(directory, fields.get("n_labels", 2), tuple(names) if names else None)

    def adopted_by(self, config: FinetuneConfig, task: Task) -> Task:
        """The task with the classes in the order of the head. Raises ValueError where it has others."""
        mend = "fresh_head: true begins with a new head"
        if self.labels is None:
            if self.count != len(task.labels):
                raise ValueError(
                    f"model: {self.directory} has a head of {self.count} classes, the rows have {len(task.labels)}: "
                    f"{', '.join(task.labels)}; {mend}"
                )
            return task
        if extra := sorted(set(task.labels) - set(self.labels)):
            raise ValueError(
                f"model: {self.directory} knows the classes {', '.join(self.labels)}; the rows have "
                f"{', '.join(extra)} besides; {mend}"
            )
        return type(task)(task.tokenizer, task.max_length, self.labels, task.options)


def _with_fresh_head(model: Transformer, fields: dict[str, Any]) -> Transformer:
    fresh = Transformer(model.config.replace(**fields))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("heads.")}
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    if other := [name for name in (*missing, *unexpected) if not name.startswith("heads.")]:
        raise ValueError(
            f"fields: with them the model has other weights than the pretrained one, such as {other[0]}; fresh_head "
            "renews the head alone"
        )
    return fresh


# ---- a new one -------------------------------------------------------------------------------------------------------


def _new(config: FinetuneConfig, model: dict[str, Any], rows: Sequence[Row]) -> tuple[Task, Transformer]:
    tokenizer = Tokenizer.load(model["tokenizer"])
    fields = {name: value for name, value in model.items() if name != "tokenizer"}
    tokens = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    given = {**tokens, **fields, "vocab_size": tokenizer.vocab_size}
    bare = _shape({**given, "objectives": []})
    task = _task(config, tokenizer, rows, bare.max_positions)
    reserved = {"vocab_size", "objectives", *task.model_fields()} & set(fields)
    if reserved:
        raise ValueError(f"model.{min(reserved)} is filled in from task and tokenizer; leave it out")
    chosen = {**{name: value for name, value in fields.items() if name != "preset"}, **task.model_fields()}
    shape, _ = with_heads(bare.to_dict(), convert.FAMILIES.get(bare.family), [task.objective], chosen)
    return task, Transformer(_shape(shape))


def _shape(fields: dict[str, Any]) -> TransformerConfig:
    try:
        return TransformerConfig.from_dict(fields)
    except ValueError as error:
        raise ValueError("model: " + str(error).removeprefix("TransformerConfig: ")) from None


# ---- a teacher -------------------------------------------------------------------------------------------------------


def _teacher(config: FinetuneConfig, path: str, task: Task) -> tuple[Transformer, list[int] | None]:
    directory = model_directory(path)
    check_vocabulary(Tokenizer.load(directory), task.tokenizer)
    known = convert.Checkpoint(directory).fields
    if task.objective not in known["objectives"]:
        raise ValueError(f"teacher: {path} has no head for {task.objective}; give a model that was fine-tuned for it")
    longest = known.get("max_positions")
    if longest is not None and task.max_length > longest:
        raise ValueError(f"teacher: {path} reads {longest} tokens, fewer than max_length ({task.max_length})")
    teacher = Transformer.from_pretrained(directory, objectives=[task.objective], dtype=torch.float32)
    labels = Judging.of(directory, known).labels
    if not labels or not task.labels or labels == task.labels:
        return teacher, None
    if set(labels) != set(task.labels):
        raise ValueError(
            f"teacher: {path} knows the classes {', '.join(labels)}, the task has {', '.join(task.labels)}; they must "
            "be the same"
        )
    return teacher, [labels.index(label) for label in task.labels]
