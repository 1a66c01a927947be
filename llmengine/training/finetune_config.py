"""FinetuneConfig: what decides a fine-tuning run, from YAML or TOML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmengine.data.rows import check_format
from llmengine.models import TransformerConfig
from llmengine.tasks import TASKS
from llmengine.training.config_errors import hint
from llmengine.training.sections import (
    Config,
    EverySection,
    Fraction,
    Natural,
    OptimizerSection,
    Positive,
    Precision,
    ScheduleSection,
    Section,
)

Size = Annotated[float, Field(ge=0.0)]  # of a regulariser; 0: off
Source = str | list[str]
EPOCHS = 3.0  # where neither epochs nor steps are given


class FinetuneData(Section):
    batch_tokens: Positive = 2048
    """Most tokens of a micro-batch."""
    accumulation: Positive = 1
    """Micro-batches per optimizer step."""
    workers: Natural = 0
    """Processes that make batches ahead; 0: in the loop's own process."""


class FinetuneOptimizer(OptimizerSection):
    lr: Annotated[float, Field(gt=0)] = 3e-5
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """A layer learns with lr times this to the power of its distance from the head, see layer_rates.py."""


class FinetuneSchedule(Section):
    """As in pretraining; `warmup` steps, or, below 1, a fraction of all steps."""

    kind: Literal["cosine", "linear", "constant"] = "linear"
    warmup: Natural | Fraction = 0.1
    final: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0

    def over(self, steps: int) -> ScheduleSection:
        warmup = int(self.warmup) if self.warmup >= 1 else round(self.warmup * steps)
        if warmup > steps:
            raise ValueError(f"schedule.warmup ({warmup}) must be at most the run's steps ({steps})")
        return ScheduleSection(kind=self.kind, warmup=warmup, final=self.final)


class FinetuneEvery(Section):
    """Each so many steps, and at the last one; evaluations may come at each epoch's end."""

    log: Positive = EverySection().log
    evaluate: Positive | Literal["epoch"] = "epoch"
    save: Positive = 500


class EmaSection(Section):
    """See llmengine/training/regularisers/ema.py."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    warmup: bool = True


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021) of the package peft: only they and the task's head are trained."""

    r: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """What an adapter adds is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    targets: list[str] | None = None
    """Names of the linear maps in the layers that get one: qkv, out, up, down, … None: all of them."""


class DistillSection(Section):
    """See llmengine/objectives/distillation.py."""

    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    temperature: Annotated[float, Field(gt=0.0)] = 2.0


class FinetuneConfig(Config):
    """A fine-tuning run. Strict (no conversions), frozen, unknown fields are errors."""

    FREE: ClassVar[tuple[str, ...]] = ("device", "keep", "data.workers", "every.log", "every.save", "test")
    LENGTH: ClassVar[tuple[str, ...]] = ("steps", "epochs")

    task: str
    """What the model is to do: a name of llmengine.tasks.TASKS."""
    model: str | dict[str, Any]
    """The directory of a pretrained model (Hugging Face's or ours) or a run folder; or, for a new model, fields of
    TransformerConfig and `tokenizer`, a directory."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """Fields of the pretrained model's config to replace: dropout, layer_dropout, …"""
    fresh_head: bool = False
    """Whether a head that the pretrained model has for this task is replaced by a new one."""
    train: Source
    """A file of rows, or several; of `format`'s kind "parallel" two, the sources' and the targets'."""
    validation: Source | Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    """Files, or the fraction of `train` that is evaluated on and never trained on; 0: no evaluations."""
    test: Source | None = None
    """What the model is tested with when it is trained."""
    columns: dict[str, str | int] = Field(default_factory=dict)
    """{what the task calls a column: what the files do}; of CoNLL files a number, as {words: 0, tags: -1}."""
    format: dict[str, Any] = Field(default_factory=dict)
    """How all of these files are written: `kind`, a name of llmengine.data.rows.KINDS (none: each file's name tells),
    and its options, as {kind: conll, scheme: iob1} or {delimiter: ";"}."""
    bad: Literal["raise", "skip"] = "raise"
    """What is done with a malformed row."""
    labels: list[str] | None = None
    """The classes; None: those of the training rows."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task."""
    max_length: Positive | None = None
    """Most tokens of an example, special tokens included; None: 256, or as many as the model reads."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    steps: Positive | None = None
    """How long: one of the two; without either, 3 epochs."""
    seed: Natural = 0
    precision: Precision = "fp32"
    device: str = "auto"
    data: FinetuneData = FinetuneData()
    optimizer: FinetuneOptimizer = FinetuneOptimizer()
    schedule: FinetuneSchedule = FinetuneSchedule()
    every: FinetuneEvery = FinetuneEvery()
    keep: Positive = 2
    """Checkpoints that stay."""

    select: str | None = None
    """The score by whose best evaluation weights are chosen: None: the task's main one; "loss"; another one of the
    task's, of which more is better, or after a minus ("-mse") less."""
    patience: Positive | None = None
    """Stop after so many evaluations without a better score."""
    min_delta: Size = 0.0
    """A score is better to `patience` where it is so by more than this."""

    r_drop: Size = 0.0
    """alpha of R-Drop (Liang et al. 2021)."""
    fgm: Size = 0.0
    """epsilon of the fast gradient method (Miyato et al. 2017)."""
    neftune: Size = 0.0
    """alpha of NEFTune (Jain et al. 2023)."""
    ema: EmaSection | None = None
    lora: LoraSection | None = None
    teacher: str | None = None
    """The directory, or run folder, of a model for the same task, from which this one learns."""
    distill: DistillSection = DistillSection()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("epochs") is None and given.get("steps") is None:
            return {**given, "epochs": EPOCHS}
        return given

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> FinetuneConfig:
        if self.task not in TASKS:
            raise ValueError(f"task: {self.task!r} is not one of {', '.join(TASKS)}{hint(self.task, TASKS)}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs ({self.epochs:g}) and steps ({self.steps}) are both given; choose one")
        for name in ("train", "validation", "test"):
            if getattr(self, name) in ("", []):
                raise ValueError(f"{name} is empty; give a file, or several")
        check_format(self.format)
        if self.validation == 0 and (self.patience is not None or self.select is not None):
            name = "patience" if self.patience is not None else "select"
            raise ValueError(f"{name} needs evaluations, but validation is 0; give files, or a fraction of train")
        if self.max_length is not None and self.data.batch_tokens < self.max_length:
            raise ValueError(
                f"data.batch_tokens ({self.data.batch_tokens}) must be at least max_length ({self.max_length}): "
                "examples are not split"
            )
        if self.lora is not None and self.fgm:
            raise ValueError("fgm moves the word embedding along its gradient, but lora freezes it; leave one out")
        self._check_model()
        return self

    def _check_model(self) -> None:
        for name in self.fields:
            if name not in TransformerConfig.model_fields:
                raise ValueError(f"fields.{name} is no field of a model{hint(name, TransformerConfig.model_fields)}")
        if isinstance(self.model, str):
            return
        if self.fields:
            raise ValueError("fields replace those of a pretrained model; put them into model")
        if self.lora is not None:
            raise ValueError("lora adapts a pretrained model; a new one has nothing to keep: leave it out")
        if not isinstance(self.model.get("tokenizer"), str):
            raise ValueError("model.tokenizer is missing: a new model needs the directory of a tokenizer")
        known = {*TransformerConfig.model_fields, "preset", "tokenizer"}
        for name in self.model:
            if name not in known:
                raise ValueError(f"model.{name} is not a field{hint(name, known)}; fields: {', '.join(sorted(known))}")

    def _constant(self) -> bool:
        whole_steps = self.schedule.warmup == 0 or self.schedule.warmup >= 1
        return super()._constant() and whole_steps
