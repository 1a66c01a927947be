"""TransformerConfig as Transformers keeps a model's config: what AutoConfig makes of our own config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from llmengine.convert import OWN
from llmengine.convert.family import PROBLEMS
from llmengine.models.config import TransformerConfig

LABELLED = {"classification", "tagging"}


def _read(ours: str) -> property:
    """A field of ours, or what follows from them, by another name."""
    return property(lambda self: getattr(self.own(), ours))


def _token(name: str) -> property:
    def read(self: LlmengineConfig) -> int | list[int] | None:
        return self.config[name]

    def write(self: LlmengineConfig, value: int | list[int] | None) -> None:
        self.config = self.own().replace(**{name: value}).to_dict()

    return property(read, write)


class LlmengineConfig(PreTrainedConfig):
    """Our fields, whole, in `config`; beside them Transformers' own: names of labels, problem_type, dtype, and so on.

    `vocab_size`, `hidden_size` and the other names by which Transformers asks are read from our fields, and token ids
    are written there. The number of labels is that of `id2label`.
    """

    model_type = OWN
    has_no_defaults_at_init = True

    vocab_size = _read("vocab_size")
    hidden_size = _read("d_model")
    intermediate_size = _read("d_ff")
    num_attention_heads = _read("n_heads")
    num_key_value_heads = _read("kv_heads")
    head_dim = _read("head_dim")
    max_position_embeddings = _read("max_positions")
    pad_token_id = _token("pad_token_id")
    bos_token_id = _token("bos_token_id")
    eos_token_id = _token("eos_token_id")
    decoder_start_token_id = _token("decoder_start_token_id")

    @property
    def num_hidden_layers(self) -> int:
        """Of the stack that has a cache, where one has."""
        own = self.own()
        return own.decoder_layers or own.n_layers

    def __init__(self, config: TransformerConfig | Mapping[str, Any] | None = None, **theirs: Any) -> None:
        if config is None:
            raise ValueError("LlmengineConfig: config is required, the fields of a TransformerConfig")
        own = config if isinstance(config, TransformerConfig) else TransformerConfig.from_dict(config)
        self.config = own.to_dict()
        theirs.setdefault("is_encoder_decoder", own.architecture == "encoder_decoder")
        if theirs.get("id2label") is None:
            theirs.setdefault("num_labels", own.n_labels)
        if "classification" in own.objectives and own.n_labels > 1:
            theirs.setdefault("problem_type", next(name for name, ours in PROBLEMS.items() if ours == own.problem))
        super().__init__(**theirs)

    def own(self, objectives: tuple[str, ...] | None = None) -> TransformerConfig:
        """Our config; with these heads instead of the file's, and as many labels as Transformers' fields name."""
        fields = dict(self.config)
        if objectives is None:
            return TransformerConfig.from_dict(fields)
        weights = {name: weight for name, weight in fields["loss_weights"].items() if name in objectives}
        fields |= {"objectives": list(objectives), "loss_weights": weights}
        fields["crf"] &= "tagging" in objectives
        if LABELLED & set(objectives):
            fields["n_labels"] = self.num_labels
            regression = "regression" if self.num_labels == 1 else fields["problem"]
            fields["problem"] = regression if self.problem_type is None else PROBLEMS[self.problem_type]
        return TransformerConfig.from_dict(fields)
