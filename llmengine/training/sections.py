"""What configs of all kinds of run share: their sections, and how they come from and go to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llmengine.training import config_file
from llmengine.training.config_errors import sentences

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Precision = Literal["fp32", "bf16"]
# JSON, YAML and TOML have lists only; strictness is meant for the elements
Betas = Annotated[tuple[Fraction, Fraction], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class OptimizerSection(Section):
    """AdamW (Loshchilov & Hutter 2019). Weight decay is for matrices: not for embeddings, biases and norms."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    betas: Betas = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm where they exceed it; null: never."""


class ScheduleSection(Section):
    """The learning rate: up linearly over `warmup` steps, then down to `final` times lr (constant: not down)."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Natural = 0
    final: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1


class EverySection(Section):
    """Each so many steps, and at the last one."""

    log: Positive = 1
    evaluate: Positive = 100
    save: Positive = 100


C = TypeVar("C", bound="Config")


class Config(Section):
    """What decides a run. Strict (no conversions), frozen, unknown fields are errors."""

    FREE: ClassVar[tuple[str, ...]]
    """A resumed run may change these: they do not touch what is computed."""
    LENGTH: ClassVar[tuple[str, ...]] = ("steps",)
    """How long the run is."""

    if TYPE_CHECKING:  # each kind of run has its own order and defaults
        seed: int
        precision: Precision
        device: str
        keep: int
        optimizer: OptimizerSection
        schedule: Any
        every: Any
        data: Any

    @classmethod
    def from_dict(cls: type[C], fields: Mapping[str, Any], overrides: Sequence[str] = ()) -> C:
        """From nested plain values. overrides: "section.field=value" each, the value in YAML.

        Raises ValueError with one line per wrong field: its path, what was given, what is allowed.
        """
        fields = config_file.overridden(fields, overrides)
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ValueError("\n".join(sentences(error, cls))) from None

    @classmethod
    def from_file(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
        """From a .yaml, .yml or .toml file. Raises FileNotFoundError, or ValueError as `from_dict`, naming the file."""
        fields = config_file.read(Path(path))
        try:
            return cls.from_dict(fields, overrides)
        except ValueError as error:
            raise ValueError(f"{path}:\n{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML hold them; `from_dict` gives an equal config."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """{"data.workers": 0, …}."""
        return config_file.flat(self.to_dict())

    def to_file(self, path: str | Path) -> None:
        """Writes YAML."""
        config_file.write(Path(path), self.to_dict())

    def changed(self: C, other: C) -> list[str]:
        """Names of the fields that differ from `other`'s and change what is computed, so that a run cannot go on."""
        ours, theirs = self.flat(), other.flat()
        differ = {name for name in ours.keys() | theirs.keys() if ours.get(name, ...) != theirs.get(name, ...)}
        longer = set(self.LENGTH) if self._constant() and other._constant() else set()  # continues the same curve
        return sorted(differ - set(self.FREE) - longer)

    def _constant(self) -> bool:
        """Whether the learning rate stays when it is up."""
        return self.schedule.kind == "constant"
