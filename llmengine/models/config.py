"""TransformerConfig: one description for every family; a family is a preset here and a table in llmengine/convert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmengine.models.presets import PRESETS

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Objective = Literal["mlm", "nsp", "clm"]
Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
TokenId = Annotated[int, Field(ge=0)] | None
# JSON, YAML and TOML have lists only; strictness is meant for the elements
Objectives = Annotated[tuple[Objective, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class TransformerConfig(BaseModel):
    """What a `Transformer` is made of. Strict (no conversions), frozen, and unknown fields are errors.

    `family` names the checkpoint layout that `save_pretrained` writes: "bert" and "gpt2" are Hugging Face's, "custom"
    is our own and can hold every combination of the knobs below.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    family: Literal["bert", "gpt2", "custom"] = "custom"
    architecture: Literal["encoder", "decoder"]
    """encoder: every token sees its whole sequence; decoder: only what precedes it."""
    objectives: Objectives = ()
    """The heads: "mlm" (masked tokens), "nsp" (sentence pairs), "clm" (next token). None of them: a bare backbone."""

    vocab_size: Positive
    d_model: Positive
    n_layers: Positive
    n_heads: Positive
    d_ff: Positive
    max_positions: Positive
    """Length of the learned position table, and so of the longest sequence."""
    type_vocab_size: Annotated[int, Field(ge=0)] = 0
    """Number of token types (segments); 0: no such embedding."""

    activation: Activation = "gelu"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    norm_place: Literal["post", "pre"] = "pre"
    """post: norm(x + f(x)) (Vaswani et al. 2017); pre: x + f(norm(x)) (Radford et al. 2019)."""
    embed_norm: bool = False
    final_norm: bool = True
    pooler: Literal["none", "cls_tanh"] = "none"
    """cls_tanh: tanh(dense(token 0)) of each sequence."""
    head_transform: bool = False
    """Dense, activation and norm before the output embedding of the token head."""
    head_bias: bool = False
    """A bias of its own on the token head's logits."""
    tie_embeddings: bool = True
    """The token head's weight is the word embedding."""

    dropout: Probability = 0.1
    """On what attention and feed-forward add to the residual stream."""
    embed_dropout: Probability = 0.1
    attention_dropout: Probability = 0.1
    activation_dropout: Probability = 0.0

    init: Literal["normal", "neighbours"] = "normal"
    """normal: N(0, init_std). neighbours: besides, sinusoidal positions and heads that begin by looking 1 to 4 places
    away, so that a small encoder learns from context at once instead of after thousands of steps."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    scale_residual_init: bool = False
    """Attention's and feed-forward's last projections start with init_std / sqrt(2 n_layers) (Radford et al. 2019)."""
    freeze_padding_row: bool = False
    """pad_token_id's word embedding starts at zero and gets no gradient from lookups, as nn.Embedding's padding_idx."""

    pad_token_id: TokenId = None
    bos_token_id: TokenId = None
    eos_token_id: TokenId = None

    use_cache: ClassVar[bool] = False
    """Not a field: forward returns no cache, generate() has its own."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Hugging Face's Trainer turns use_cache off in every model's config; here it is never on.
        if (name, value) != ("use_cache", False):
            super().__setattr__(name, value)

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> TransformerConfig:
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must divide d_model ({self.d_model})")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} ({token}) must be below vocab_size ({self.vocab_size})")
        if len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives {list(self.objectives)} names one twice")
        for objective in self.objectives:
            if self.causal != (objective == "clm"):
                raise ValueError(f'objectives: "{objective}" does not fit architecture "{self.architecture}"')
        if "nsp" in self.objectives and self.pooler == "none":
            raise ValueError('objectives: "nsp" reads the pooled token; set pooler to "cls_tanh"')
        if self.freeze_padding_row and self.pad_token_id is None:
            raise ValueError("freeze_padding_row needs pad_token_id")
        return self

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def causal(self) -> bool:
        return self.architecture == "decoder"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TransformerConfig:
        """The inverse of `to_dict`. A key "preset" starts from that preset; the other keys then override it.

        Raises ValueError with one line per wrong field.
        """
        fields = dict(fields)
        preset = fields.pop("preset", None)
        if preset is not None:
            if preset not in PRESETS:
                raise ValueError(f"TransformerConfig: preset {preset!r} is not one of {', '.join(PRESETS)}")
            fields = PRESETS[preset] | fields
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ValueError("TransformerConfig: " + "; ".join(map(_sentence, error.errors()))) from None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TransformerConfig:
        """A published model's shape by name ("bert-base", "gpt2", ...), with fields of your choice replaced."""
        return cls.from_dict({"preset": name, **overrides})

    def replace(self, **fields: Any) -> TransformerConfig:
        """A copy with these fields, validated again."""
        return self.from_dict(self.to_dict() | fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return self.model_dump(mode="json")

    def to_json_string(self) -> str:
        """`to_dict` as text, under the name by which Hugging Face's loggers ask for it."""
        return self.model_dump_json(indent=2)


def _sentence(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"] if not isinstance(part, str) or "[" not in part)
    if not place:
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        return f"{place} is not a field; fields: {', '.join(TransformerConfig.model_fields)}"
    if error["type"] == "missing":
        return f"{place} is required"
    return f"{place}: {error['msg']}, got {error['input']!r}"
