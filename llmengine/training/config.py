"""RunConfig: what decides a training run, from YAML or TOML, and the sentences that say what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmengine.models.config import PRETRAINING, TransformerConfig
from llmengine.models.presets import PRESETS
from llmengine.objectives import OBJECTIVES, decoder_start, model_heads
from llmengine.training import config_file
from llmengine.training.config_errors import hint, sentences

Objective = Literal["bert", "mlm", "sop", "clm", "denoising", "span_corruption", "plm", "electra"]
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
# JSON, YAML and TOML have lists only; strictness is meant for the elements
Betas = Annotated[tuple[Fraction, Fraction], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]

_WORDPIECE = {"kind": "wordpiece", "vocab_size": 8192, "lowercase": True}
_BPE = {"kind": "bpe", "vocab_size": 8192, "lowercase": False}
_TOKENIZERS = {
    "bert": _WORDPIECE,
    "mlm": _WORDPIECE,
    "sop": _WORDPIECE,
    "electra": _WORDPIECE,
}  # those of the others: _BPE
_FILLED_IN = {
    "objectives": "objective",
    "vocab_size": "tokenizer",
    "pad_token_id": "tokenizer",
    "bos_token_id": "tokenizer",
    "eos_token_id": "tokenizer",
    "decoder_start_token_id": "objective",
}
# A resumed run may change these: they do not touch what is computed.
FREE = ("device", "keep", "data.workers", "every.log", "every.evaluate", "every.save")


class Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class TokenizerSection(Section):
    """Trained on the corpus once (kind, vocab_size, lowercase), or read from the directory `path`."""

    kind: Literal["wordpiece", "bpe"] | None = None
    vocab_size: Annotated[int, Field(ge=64)] | None = None
    lowercase: bool | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _trained_or_read(self) -> TokenizerSection:
        if self.path is not None:
            for name in ("kind", "vocab_size", "lowercase"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to a tokenizer that is trained; with path, leave it out")
        return self


class DataSection(Section):
    sequence_length: Positive = 128
    """Longest example in tokens, special tokens included."""
    batch_tokens: Positive = 4096
    """Most tokens of a micro-batch."""
    accumulation: Positive = 1
    """Micro-batches per optimizer step."""
    held_out: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05
    """Fraction of the corpus that is evaluated on and never trained on."""
    workers: Natural = 0
    """Processes that make batches ahead; 0: in the loop's own process."""
    options: dict[str, Any] = {}
    """Options of the objective."""

    @model_validator(mode="after")
    def _a_sequence_fits(self) -> DataSection:
        if self.batch_tokens < self.sequence_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be at least sequence_length ({self.sequence_length}): "
                "sequences are not split"
            )
        return self


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


class RunConfig(Section):
    """A training run. Strict (no conversions), frozen, unknown fields are errors. `examples/` has runs to copy.

    `model` holds TransformerConfig's fields, or a preset and fields that differ from it; vocab_size, special token ids
    and objectives are filled in from tokenizer and objective. Without a tokenizer: WordPiece for masked tokens
    ("bert", "mlm", "sop", "electra"), byte-level BPE for the rest. schedule.warmup is a tenth of the steps where it is
    not given. "electra": `model` is the discriminator.
    """

    corpus: str | list[str]
    """ "austen", a text or JSON-lines file, a folder of such, or several of them."""
    objective: Objective
    model: dict[str, Any]
    steps: Positive
    seed: Natural = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights, gradients and optimizer state stay float32."""
    device: str = "auto"
    """ "auto": the first CUDA GPU if there is one, else the CPU."""
    tokenizer: TokenizerSection
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    every: EverySection = EverySection()
    keep: Positive = 2
    """Checkpoints that stay."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: Any) -> Any:
        """Defaults that depend on other fields."""
        if not isinstance(fields, Mapping):
            return fields
        fields = dict(fields)
        tokenizer, schedule = fields.get("tokenizer", {}), fields.get("schedule", {})
        if isinstance(tokenizer, Mapping):
            trained = {} if tokenizer.get("path") else _TOKENIZERS.get(fields.get("objective"), _BPE)
            fields["tokenizer"] = {**trained, **tokenizer}
        if isinstance(schedule, Mapping):
            steps = fields.get("steps")
            fields["schedule"] = {"warmup": max(steps, 0) // 10 if isinstance(steps, int) else 0, **schedule}
        return fields

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> RunConfig:
        if self.corpus == [] or self.corpus == "":
            raise ValueError('corpus is empty; give "austen", a file or a folder')
        if self.schedule.warmup > self.steps:
            raise ValueError(f"schedule.warmup ({self.schedule.warmup}) must be at most steps ({self.steps})")
        model = self._model()
        if model.max_positions is not None and model.max_positions < self.data.sequence_length:
            raise ValueError(
                f"data.sequence_length ({self.data.sequence_length}) must be at most "
                f"model.max_positions ({model.max_positions})"
            )
        if self.objective in ("bert", "sop") and model.type_vocab_size < 2:
            raise ValueError(
                f'model.type_vocab_size is {model.type_vocab_size}; objective "{self.objective}" has two segments and '
                "needs 2"
            )
        return self

    def _model(self) -> TransformerConfig:
        """The model before its tokenizer is there: checks all that does not depend on the vocabulary."""
        for name in self.model:
            if name in _FILLED_IN:
                raise ValueError(f"model.{name} is filled in from {_FILLED_IN[name]}; leave it out")
            known = {*TransformerConfig.model_fields, "preset"} - set(_FILLED_IN)
            if name not in known:
                raise ValueError(f"model.{name} is not a field{hint(name, known)}; fields: {', '.join(sorted(known))}")
        preset = self.model.get("preset")
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"model.preset: {preset!r} is not a preset{hint(preset, PRESETS)}; {', '.join(PRESETS)}")
        architecture = self.model.get("architecture", PRESETS[preset]["architecture"] if preset else None)
        needed = OBJECTIVES[self.objective].architecture
        if architecture in PRETRAINING and architecture != needed:
            raise ValueError(f'objective: "{self.objective}" needs the architecture {needed}; model is {architecture}')
        return self.transformer(self.tokenizer.vocab_size or 2**20, pad_id=0, bos_id=0, eos_id=0)

    def transformer(
        self, vocab_size: int, *, pad_id: int | None, bos_id: int | None, eos_id: int | None
    ) -> TransformerConfig:
        """The model's config for a tokenizer of this size and with these special tokens (None: it has none)."""
        tokens = {"pad_token_id": pad_id, "bos_token_id": bos_id, "eos_token_id": eos_id}
        start = decoder_start(self.objective, **self.data.options)
        if start is not None:
            tokens["decoder_start_token_id"] = tokens[f"{start}_token_id"]
        heads = list(model_heads(self.objective))
        # a pooler that no head reads would never be trained
        unpooled = {} if {"nsp", "sop"} & set(heads) else {"pooler": "none"}
        given = {**self.model, **tokens, **unpooled, "objectives": heads, "vocab_size": vocab_size}
        try:
            return TransformerConfig.from_dict(given)
        except ValueError as error:
            raise ValueError("model: " + str(error).removeprefix("TransformerConfig: ")) from None

    # ---- from and to files -------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
        """From nested plain values. overrides: "section.field=value" each, the value in YAML.

        Raises ValueError with one line per wrong field: its path, what was given, what is allowed.
        """
        fields = config_file.overridden(fields, overrides)
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ValueError("\n".join(sentences(error, cls))) from None

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """From a .yaml, .yml or .toml file. Raises FileNotFoundError, or ValueError as `from_dict`, naming the file."""
        fields = config_file.read(Path(path))
        try:
            return cls.from_dict(fields, overrides)
        except ValueError as error:
            raise ValueError(f"{path}:\n{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML hold them; `from_dict` gives an equal config."""
        fields = self.model_dump(mode="json")
        fields["tokenizer"] = self.tokenizer.model_dump(exclude_none=True)
        return fields

    def flat(self) -> dict[str, Any]:
        """{"data.workers": 0, …}."""
        return config_file.flat(self.to_dict())

    def to_file(self, path: str | Path) -> None:
        """Writes YAML."""
        config_file.write(Path(path), self.to_dict())

    def changed(self, other: RunConfig) -> list[str]:
        """Names of the fields that differ from `other`'s and change what is computed, so that a run cannot go on."""
        ours, theirs = self.flat(), other.flat()
        differ = {name for name in ours.keys() | theirs.keys() if ours.get(name, ...) != theirs.get(name, ...)}
        constant = self.schedule.kind == other.schedule.kind == "constant"  # then more steps continue the same curve
        return sorted(differ - set(FREE) - ({"steps"} if constant else set()))
