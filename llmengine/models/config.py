"""TransformerConfig: one description for every family; a family is a preset here and a table in llmengine/convert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmengine.models.presets import PRESETS
from llmengine.models.smoothing import check_smoothing

Family = Literal[
    "bert", "roberta", "xlm-roberta", "albert", "electra", "modernbert", "openai-gpt", "gpt2", "gpt_neo", "gpt_neox",
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "xlnet", "bart", "mbart", "marian", "t5",
    "custom",
]  # fmt: skip
Activation = Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu"]
Objective = Literal["mlm", "nsp", "sop", "rtd", "clm", "seq2seq", "plm", "classification", "tagging", "qa", "choice"]
Positions = Literal[
    "learned", "sinusoid", "sinusoid_halves", "sinusoid_fairseq", "rotary", "alibi", "buckets", "relative", "none"
]
Positive = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
TokenId = Annotated[int, Field(ge=0)] | None
# JSON, YAML and TOML have lists only; strictness is meant for the elements
_AsTuple = BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
Objectives = Annotated[tuple[Objective, ...], _AsTuple]
LayerTypes = Annotated[tuple[Literal["full", "window"], ...], _AsTuple]
Names = Annotated[tuple[str, ...], _AsTuple]

# The heads of each architecture; those for fine-tuning go with all.
TASKS = ("classification", "tagging", "qa", "choice")
PRETRAINING = {
    "encoder": ("mlm", "nsp", "sop", "rtd", "plm"),
    "decoder": ("clm",),
    "encoder_decoder": ("seq2seq",),
}
_TABLES = ("learned", "sinusoid", "sinusoid_halves", "sinusoid_fairseq")


class Rotary(BaseModel):
    """Rotary position embedding (Su et al. 2021) and what stretches it to longer texts."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    theta: Number = 10000.0
    window_theta: Number | None = None
    """Of windowed layers; None: theta. Those are never stretched."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The part of each head's features that turns."""
    interleaved: bool = False
    """Pairs are neighbours (2k, 2k + 1) rather than halves (k, k + R/2)."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """linear: Chen et al. 2023; llama3: Dubey et al. 2024; yarn: Peng et al. 2023."""
    factor: Number = 1.0
    original_positions: Positive | None = None
    low_frequency: Number = 1.0
    high_frequency: Number = 4.0
    beta_fast: Number = 32.0
    beta_slow: Number = 1.0
    attention_factor: Number | None = None

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Rotary:
        if self.scaling in ("llama3", "yarn") and self.original_positions is None:
            raise ValueError(f'rotary: scaling "{self.scaling}" needs original_positions')
        return self


class TransformerConfig(BaseModel):
    """What a `Transformer` is made of. Strict (no conversions), frozen, and unknown fields are errors.

    `family` names the checkpoint layout that `save_pretrained` writes: "custom" is our own and can hold every
    combination of the knobs below, the others are Hugging Face's.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    family: Family = "custom"
    architecture: Literal["encoder", "decoder", "encoder_decoder"]
    """encoder: every token sees its whole sequence; decoder: only what precedes it; encoder_decoder: a decoder that
    also sees the whole of what an encoder made of another sequence."""
    objectives: Objectives = ()
    """The heads. Pretraining: "mlm" (masked tokens), "nsp" (next sentence), "sop" (sentence order), "rtd" (replaced
    tokens), "plm" (permuted order), "clm" (next token), "seq2seq" (next token of the target). Fine-tuning:
    "classification", "tagging", "qa" (start and end), "choice". None of them: a bare backbone."""

    # ---- shape
    vocab_size: Positive
    d_model: Positive
    n_layers: Positive
    n_decoder_layers: Positive | None = None
    """Of an encoder-decoder's decoder; None: n_layers."""
    n_heads: Positive
    n_decoder_heads: Positive | None = None
    """Of an encoder-decoder's decoder, in its self-attention and in its attention to the encoder; None: n_heads."""
    n_kv_heads: Positive | None = None
    """Heads of keys and values, each shared by n_heads / n_kv_heads queries (Ainslie et al. 2023); None: n_heads."""
    d_head: Positive | None = None
    """Features of a head; None: d_model / n_heads."""
    d_ff: Positive
    d_decoder_ff: Positive | None = None
    """Of an encoder-decoder's decoder; None: d_ff."""
    d_embed: Positive | None = None
    """Features of the embeddings, projected to d_model (Lan et al. 2019); None: d_model."""
    share_layers: bool = False
    """One layer, applied n_layers times (Lan et al. 2019)."""

    # ---- embeddings and positions
    share_embeddings: bool = True
    """Whether both sides of an encoder-decoder have one word embedding."""
    encoder_vocab_size: Positive | None = None
    """Of an encoder-decoder whose encoder has words of its own; None: vocab_size."""
    type_vocab_size: Annotated[int, Field(ge=0)] = 0
    """Number of token types (segments); 0: no such embedding."""
    embed_norm: bool = False
    embed_scale: bool = False
    """Word embeddings are multiplied by sqrt(d_model)."""
    positions: Positions = "learned"
    """learned: a table; sinusoid: sine and cosine in turns (Vaswani et al. 2017), as halves, or as halves with
    fairseq's frequencies; rotary: queries and keys turn; alibi: -slope |distance| on the scores (Press et al. 2022);
    buckets: a learned number per head and bucket of distances (Raffel et al. 2020); relative: Transformer-XL's."""
    max_positions: Positive | None
    """The longest sequence; None: no limit, where positions need no table."""
    position_offset: Annotated[int, Field(ge=0)] = 0
    """Row of the position table at which the first token stands."""
    position_of: Literal["column", "token"] = "column"
    """What a token's position is, by default: its column in the batch, or its place among the tokens of its row."""
    rotary: Annotated[Rotary, BeforeValidator(lambda v: Rotary(**v) if isinstance(v, dict) else v)] = Rotary()
    position_buckets: Positive = 32
    position_bucket_distance: Positive = 128
    """Distances from here on share the last bucket."""
    position_clamp: Positive | None = None
    """relative: distances beyond count as this one."""
    relative_causal: bool = False
    """relative: tokens see what precedes them only, besides what an order says."""
    memory_length: Annotated[int, Field(ge=0)] = 0
    """relative: how many hidden states of earlier segments are kept; 0: all."""
    memory_reuse: Annotated[int, Field(ge=0)] = 0
    """relative: how many tokens of a segment enter the memory, from its beginning; 0: all."""

    # ---- layers
    norm: Literal["layer", "rms", "rms_offset"] = "layer"
    """rms_offset: root mean square, multiplied by 1 + weight (Gemma)."""
    norm_eps: Number = 1e-5
    norm_bias: bool = True
    norm_place: Literal["post", "pre", "sandwich", "parallel"] = "pre"
    """post: norm(x + f(x)) (Vaswani et al. 2017); pre: x + f(norm(x)) (Radford et al. 2019); sandwich:
    x + norm(f(norm(x))); parallel: x + attention(norm(x)) + feed_forward(norm'(x))."""
    first_norm: bool = True
    """Whether the first layer has a norm before its attention."""
    final_norm: bool = True
    window: Positive | None = None
    """How many tokens to either side (to the left, in a decoder) a windowed layer sees, besides the token itself."""
    layer_types: LayerTypes | None = None
    """"full" or "window" for each layer; None: all windowed where `window` is given."""
    attention_scale: float | None = None
    """What scores are multiplied by; None: 1 / sqrt(d_head)."""
    attention_scale_by_layer: bool = False
    """Scores of layer i are besides divided by i + 1."""
    attention_softcap: Annotated[float, Field(ge=0)] = 0.0
    """c: scores become c tanh(scores / c) (Gemma 2); 0: off."""
    qk_norm: bool = False
    """Each head's queries and keys are normed before they turn."""
    qkv_bias: bool = True
    attention_bias: bool = True
    """Of attention's output projection."""
    feed_forward_bias: bool = True
    activation: Activation = "gelu"
    gated: bool = False
    """Feed-forward is down(act(gate(x)) up(x)) (Shazeer 2020)."""

    # ---- heads
    pooler: Literal["none", "cls_tanh"] = "none"
    """cls_tanh: tanh(dense(token 0)) of each sequence."""
    head_transform: bool = False
    """Dense, activation and norm before the output embedding of the token head."""
    head_transform_bias: bool = True
    head_bias: bool = False
    """A bias of its own on the token head's logits."""
    head_scale: Number = 1.0
    """What hidden states are multiplied by before the token head."""
    logit_softcap: Annotated[float, Field(ge=0)] = 0.0
    tie_embeddings: bool = True
    """The token head's weight is the word embedding."""
    n_labels: Positive = 2
    """Classes of "classification" and "tagging"."""
    labels: Names | None = None
    """Their names, in the order of the head's outputs."""
    problem: Literal["single", "multi", "regression"] = "single"
    """classification: one class per sequence (cross-entropy), several (binary cross-entropy), numbers (square)."""
    summary: Literal["first", "last", "mean"] = "first"
    """The hidden state that stands for a sequence in "classification" and "choice"."""
    classifier: Literal["linear", "pooled", "dense_tanh", "dense_gelu", "dense_norm"] = "linear"
    """What comes before the last linear map of "classification": nothing, the pooler, or a dense layer."""
    classifier_bias: bool = True
    crf: bool = False
    """tagging: tags of a sequence are a linear-chain conditional random field (Lafferty et al. 2001)."""
    loss_weights: dict[str, float] = Field(default_factory=dict)
    """What each objective's loss counts in the sum; 1 where none is given."""

    # ---- training
    dropout: Probability = 0.1
    """On what attention and feed-forward add to the residual stream."""
    embed_dropout: Probability = 0.1
    attention_dropout: Probability = 0.1
    activation_dropout: Probability = 0.0
    final_dropout: Probability = 0.0
    classifier_dropout: Probability = 0.1
    layer_dropout: Probability = 0.0
    """The probability that a training step skips a layer (Fan et al. 2019)."""
    label_smoothing: Probability = 0.0
    """Of the losses of the token head, "classification" and "tagging" while the model trains; eval() measures without
    it."""
    smoothing: Literal["torch", "fairseq", "opennmt"] = "torch"
    """Over which classes label_smoothing is spread: all; all but the label; those but padding, less the entropy. The
    formulas are in models/smoothing.py."""

    fp8: Literal["tensor", "block"] | None = None
    """Scales of layers' 8-bit projections (functional.fp8_linear). In no family's config.json: tell from_pretrained."""
    init: Literal["normal", "neighbours"] = "normal"
    """normal: N(0, init_std). neighbours: besides, sinusoidal positions and heads that begin by looking 1 to 4 places
    away, so that a small encoder learns from context at once instead of after thousands of steps."""
    init_std: Number = 0.02
    scale_residual_init: bool = False
    """Attention's and feed-forward's last projections start with init_std / sqrt(2 n_layers) (Radford et al. 2019)."""
    freeze_padding_row: bool = False
    """pad_token_id's word embedding starts at zero and gets no gradient from lookups, as nn.Embedding's padding_idx."""

    pad_token_id: TokenId = None
    bos_token_id: TokenId = None
    eos_token_id: Annotated[TokenId | tuple[Annotated[int, Field(ge=0)], ...], _AsTuple] = None
    """One token, or several that end a text."""
    decoder_start_token_id: TokenId = None
    """What an encoder-decoder's target begins with; None, with seq2seq: the target's last token (Liu et al. 2020)."""

    use_cache: ClassVar[bool] = False
    """Not a field: forward returns no cache, generate() has its own."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Hugging Face's Trainer turns use_cache off in every model's config; here it is never on.
        if (name, value) != ("use_cache", False):
            super().__setattr__(name, value)

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> TransformerConfig:
        for check in (_check_shape, _check_positions, _check_tokens, _check_objectives, check_smoothing):
            check(self)
        return self

    # ---- what follows from the fields --------------------------------------------------------------------------------

    @property
    def head_dim(self) -> int:
        return self.d_head or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def embed_dim(self) -> int:
        return self.d_embed or self.d_model

    @property
    def decoder_layers(self) -> int:
        """0 for an encoder."""
        if self.architecture == "encoder_decoder":
            return self.n_decoder_layers or self.n_layers
        return self.n_layers if self.causal else 0

    @property
    def decoder_side(self) -> TransformerConfig:
        """These fields as the decoder has them: its heads and its feed-forward under the names without "decoder"."""
        own = {"n_heads": self.n_decoder_heads, "d_ff": self.d_decoder_ff}
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})

    @property
    def source_vocab_size(self) -> int:
        """Of input_ids: where an encoder-decoder reads other words than it writes, the encoder's."""
        return self.encoder_vocab_size or self.vocab_size

    @property
    def causal(self) -> bool:
        """Whether each token's label is the next token of the same sequence."""
        return self.architecture == "decoder"

    @property
    def token_task(self) -> str | None:
        """The objective of the token head, if there is one."""
        return next((o for o in self.objectives if o in ("mlm", "clm", "seq2seq", "plm")), None)

    @property
    def counts_distances(self) -> bool:
        """Whether attention depends on how many tokens lie between two, beyond what position_ids say."""
        return self.window is not None or self.positions in ("alibi", "buckets", "relative")

    def windowed(self, layer: int) -> bool:
        if self.window is None:
            return False
        return self.layer_types is None or self.layer_types[layer] == "window"

    def score_scale(self, layer: int) -> float:
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.attention_scale_by_layer else scale

    # ---- in and out --------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TransformerConfig:
        """The inverse of `to_dict`. A key "preset" starts from that preset; the other keys then override it.

        Raises ValueError with one line per wrong field.
        """
        fields = dict(fields)
        preset = fields.pop("preset", None)
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
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

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Of the fields that have one, as `to_dict` gives them."""
        shape: Any = dict.fromkeys(("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_positions"), 1)
        fields = cls(architecture="encoder", **shape).to_dict()
        return {name: value for name, value in fields.items() if name not in (*shape, "architecture")}

    def to_json_string(self) -> str:
        """`to_dict` as text, under the name by which Hugging Face's loggers ask for it."""
        return self.model_dump_json(indent=2)


# ---- what contradicts what -------------------------------------------------------------------------------------------


def _check_shape(c: TransformerConfig) -> None:
    for name in ("n_heads", "n_decoder_heads"):
        heads = getattr(c, name) or c.n_heads
        if c.d_head is None and c.d_model % heads:
            raise ValueError(f"{name} ({heads}) must divide d_model ({c.d_model}), or give d_head")
        if heads % (c.n_kv_heads or heads):
            raise ValueError(f"n_kv_heads ({c.n_kv_heads}) must divide {name} ({heads})")
    for name in ("n_decoder_layers", "n_decoder_heads", "d_decoder_ff"):
        if getattr(c, name) is not None and c.architecture != "encoder_decoder":
            raise ValueError(f'{name} is for architecture "encoder_decoder"; this is "{c.architecture}"')
    if not c.share_embeddings and c.architecture != "encoder_decoder":
        raise ValueError(f'share_embeddings false is for architecture "encoder_decoder"; this is "{c.architecture}"')
    if c.encoder_vocab_size is not None and c.share_embeddings:
        raise ValueError("encoder_vocab_size is for an encoder with words of its own; set share_embeddings to false")
    if c.share_layers and c.architecture != "encoder":
        raise ValueError(f'share_layers is for architecture "encoder"; this is "{c.architecture}"')
    if c.layer_types is not None:
        if c.window is None and "window" in c.layer_types:
            raise ValueError("layer_types names windowed layers; give window")
        for name, depth in (("n_layers", c.n_layers), ("n_decoder_layers", c.decoder_layers or c.n_layers)):
            if len(c.layer_types) != depth:
                raise ValueError(f"layer_types has {len(c.layer_types)} entries for {name} {depth}")
    if c.norm_place == "parallel" and c.architecture == "encoder_decoder":
        raise ValueError('norm_place "parallel" does not go with architecture "encoder_decoder"')


def _check_positions(c: TransformerConfig) -> None:
    if c.max_positions is None and c.positions in _TABLES:
        raise ValueError(f'max_positions must be given: positions "{c.positions}" is a table')
    if c.position_offset and c.positions not in _TABLES:
        raise ValueError(f'position_offset is for tables of positions; positions is "{c.positions}"')
    for side in (c, c.decoder_side):
        if c.positions == "rotary" and int(side.head_dim * c.rotary.fraction) % 2:
            raise ValueError(f"rotary turns pairs, but fraction {c.rotary.fraction} of {side.head_dim} features is odd")
    if c.positions == "relative" and c.architecture != "encoder":
        raise ValueError(f'positions "relative" is for architecture "encoder"; this is "{c.architecture}"')
    if c.positions == "relative" and (c.norm_place, c.final_norm, c.embed_norm) != ("post", False, False):
        raise ValueError('positions "relative" goes with norm_place "post" and neither final_norm nor embed_norm')
    least, most = 2 if c.architecture == "decoder" else 4, c.position_bucket_distance * (2 + 2 * (not c.decoder_layers))
    if c.positions == "buckets" and not least <= c.position_buckets < most:
        raise ValueError(
            f"position_buckets ({c.position_buckets}) must be from {least} to {most - 1}: half of them are for single "
            f"distances, which must be below position_bucket_distance ({c.position_bucket_distance})"
        )
    if c.init == "neighbours" and (c.positions != "learned" or c.kv_heads != c.n_heads or c.share_layers or c.d_embed):
        raise ValueError(
            'init "neighbours" needs learned positions of d_model features, as many key heads as heads, own layers'
        )


def _check_tokens(c: TransformerConfig) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        tokens = getattr(c, name)
        for token in tokens if isinstance(tokens, tuple) else [tokens]:
            if token is not None and token >= c.vocab_size:
                raise ValueError(f"{name} ({token}) must be below vocab_size ({c.vocab_size})")
    if c.freeze_padding_row and (c.pad_token_id is None or c.pad_token_id >= c.source_vocab_size):
        raise ValueError("freeze_padding_row needs pad_token_id, a row of every word embedding")


def _check_objectives(c: TransformerConfig) -> None:
    if len(set(c.objectives)) != len(c.objectives):
        raise ValueError(f"objectives {list(c.objectives)} names one twice")
    for objective in c.objectives:
        if objective not in (*PRETRAINING[c.architecture], *TASKS):
            raise ValueError(f'objectives: "{objective}" does not fit architecture "{c.architecture}"')
    if {"nsp", "sop"} & set(c.objectives) and c.pooler == "none":
        raise ValueError('objectives: "nsp" and "sop" read the pooled token; set pooler to "cls_tanh"')
    if c.classifier == "pooled" and c.pooler == "none" and {"classification", "choice"} & set(c.objectives):
        raise ValueError('classifier "pooled" reads the pooled token; set pooler to "cls_tanh"')
    if c.architecture == "decoder" and c.summary == "first" and {"classification", "choice"} & set(c.objectives):
        raise ValueError('summary "first" is a token that sees no other in a decoder; set summary to "last" or "mean"')
    if c.labels is not None and len(c.labels) != c.n_labels:
        raise ValueError(f"labels has {len(c.labels)} names for n_labels {c.n_labels}")
    if c.labels is not None and len(set(c.labels)) != len(c.labels):
        raise ValueError(f"labels {list(c.labels)} names one twice")
    if c.crf and "tagging" not in c.objectives:
        raise ValueError('crf is for objective "tagging"')
    if unknown := sorted(c.loss_weights.keys() - set(c.objectives)):
        raise ValueError(f"loss_weights names {unknown}, which are not among objectives {list(c.objectives)}")
    if len({"mlm", "plm"} & set(c.objectives)) > 1:
        raise ValueError('objectives: "mlm" and "plm" are one token head; choose one')
    if "plm" in c.objectives and c.positions != "relative":
        raise ValueError('objectives: "plm" needs positions "relative"')


def _sentence(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"] if not isinstance(part, str) or "[" not in part)
    if not place:
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        return f"{place} is not a field; fields: {', '.join(TransformerConfig.model_fields)}"
    if error["type"] == "missing":
        return f"{place} is required"
    return f"{place}: {error['msg']}, got {error['input']!r}"
