"""RunConfig: what decides a pretraining run, from YAML or TOML, and the sentences that say what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmengine.data.shards import TOKENIZER, shards_of
from llmengine.models.config import PRETRAINING, TransformerConfig
from llmengine.models.presets import PRESETS
from llmengine.objectives import OBJECTIVES, decoder_start, memory_fields, model_heads
from llmengine.training.config_errors import hint
from llmengine.training.sections import (
    Config,
    EverySection,
    Natural,
    OptimizerSection,
    Positive,
    Precision,
    ScheduleSection,
    Section,
)

Objective = Literal["bert", "mlm", "sop", "clm", "denoising", "span_corruption", "plm", "electra", "tlm"]

_WORDPIECE = {"kind": "wordpiece", "vocab_size": 8192, "lowercase": True}
_BPE = {"kind": "bpe", "vocab_size": 8192, "lowercase": False}
_TOKENIZERS = {
    "bert": _WORDPIECE,
    "mlm": _WORDPIECE,
    "sop": _WORDPIECE,
    "electra": _WORDPIECE,
    "tlm": _WORDPIECE,
}  # those of the others: _BPE
_FILLED_IN = {
    "objectives": "objective",
    "vocab_size": "tokenizer",
    "pad_token_id": "tokenizer",
    "bos_token_id": "tokenizer",
    "eos_token_id": "tokenizer",
    "decoder_start_token_id": "objective",
}


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
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective."""

    @model_validator(mode="after")
    def _a_sequence_fits(self) -> DataSection:
        if self.batch_tokens < self.sequence_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be at least sequence_length ({self.sequence_length}): "
                "sequences are not split"
            )
        return self


class RunConfig(Config):
    """A pretraining run. Strict (no conversions), frozen, unknown fields are errors. `examples/` has runs to copy.

    `model` holds TransformerConfig's fields, or a preset and fields that differ from it; vocab_size, special token ids
    and objectives are filled in from tokenizer and objective. Without a tokenizer: a tokenised corpus's own; else
    WordPiece for masked tokens ("bert", "mlm", "sop", "electra"), byte-level BPE for the rest. schedule.warmup is a
    tenth of the steps where it is not given. "electra": `model` is the discriminator.
    """

    FREE: ClassVar[tuple[str, ...]] = ("device", "keep", "data.workers", "every.log", "every.evaluate", "every.save")

    corpus: str | list[str]
    """ "austen", a text or JSON-lines file, a folder of such, or several of them; or what `tokenize` wrote. Objective
    "tlm": files of rows with source and target, or two text files, line by line."""
    objective: Objective
    model: dict[str, Any]
    steps: Positive
    seed: Natural = 0
    precision: Precision = "fp32"
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
            default = {} if tokenizer.get("path") else _TOKENIZERS.get(fields.get("objective"), _BPE)
            if not tokenizer and (directory := shards_of(fields.get("corpus"))):
                default = {"path": str(directory / TOKENIZER)}
            fields["tokenizer"] = {**default, **tokenizer}
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
        languages = self.objective == "tlm" and self.data.options.get("languages", True)
        if (self.objective in ("bert", "sop") or languages) and model.type_vocab_size < 2:
            raise ValueError(
                f'model.type_vocab_size is {model.type_vocab_size}; objective "{self.objective}" has two segments and '
                f"needs 2{', or data.options.languages: false' if languages else ''}"
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
        if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
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
        memory = memory_fields(self.objective, **self.data.options)
        for name, value in memory.items():
            if (other := self.model.get(name, value)) != value:
                raise ValueError(f"model.{name} is {other}, but data.options say {value}; leave it out")
        given = {**self.model, **tokens, **unpooled, **memory, "objectives": heads, "vocab_size": vocab_size}
        try:
            return TransformerConfig.from_dict(given)
        except ValueError as error:
            raise ValueError("model: " + str(error).removeprefix("TransformerConfig: ")) from None

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"tokenizer": self.tokenizer.model_dump(exclude_none=True)}
