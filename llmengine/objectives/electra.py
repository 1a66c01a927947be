"""ELECTRA (Clark et al. 2020): a small generator fills masks, and a discriminator finds which tokens it replaced.

Of a text 15 % of the tokens are predicted by the generator, which sees masks in place of 85 % of them. A sample of its
prediction is put into the text, and for every token the discriminator says whether it is the original one; a sample
that happens to be the original counts as original. The generator learns from its own loss alone: samples carry no
gradient. Both share their embeddings. loss = mlm + 50 rtd.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Module

from llmengine.data.examples import IGNORED
from llmengine.models import Transformer, TransformerConfig
from llmengine.models.output import TransformerOutput
from llmengine.objectives.masking import Masking
from llmengine.objectives.mlm import MlmExamples

GENERATOR = "generator"
EMBEDDINGS, SHARED = "encoder.embeddings.", ("word", "position", "token_type", "norm")


@dataclass(frozen=True, kw_only=True)
class ElectraOptions(Masking):
    """Options of masking: 15 % of the predicted tokens stay as they are, and none becomes a random one.

    generator_part: the generator has 1 / generator_part of the discriminator's features and heads.
    rtd_weight: what the discriminator's loss counts; the generator's counts 1.
    """

    mask_share: float = 0.85
    random_share: float = 0.0
    generator_part: int = 4
    rtd_weight: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator_part < 1:
            raise ValueError(f"objective: generator_part must be 1 or more, got {self.generator_part}")


class ElectraExamples(MlmExamples):
    """Those of "mlm", for both models of `Electra`. Options: those of `ElectraOptions`."""

    name = "electra"
    heads = ("mlm", "rtd")
    model_heads = ("rtd",)
    Options = ElectraOptions


class Electra(Module):
    """Generator and discriminator, trained together. The discriminator is what remains: `electra.discriminator`."""

    def __init__(
        self, discriminator: TransformerConfig, generator: TransformerConfig | None = None, *, rtd_weight: float = 50.0
    ) -> None:
        """Makes both. generator: default, the discriminator with a quarter of its features and heads."""
        super().__init__()
        if discriminator.architecture != "encoder":
            raise ValueError(f"Electra: discriminator must be an encoder, got {discriminator.architecture!r}")
        generator = generator or smaller(discriminator)
        shared = ("vocab_size", "embed_dim", "positions", "max_positions", "position_offset", "type_vocab_size")
        for name in (*shared, "embed_norm"):
            if getattr(generator, name) != getattr(discriminator, name):
                raise ValueError(
                    f"Electra: the embeddings are shared, but {name} of the generator is {getattr(generator, name)}, "
                    f"of the discriminator {getattr(discriminator, name)}"
                )
        self.discriminator = Transformer(_with_head(discriminator, "rtd"))
        self.generator = Transformer(_with_head(generator, "mlm"))
        self.config = self.discriminator.config.replace(loss_weights={"rtd": rtd_weight})
        ours, theirs = (model.stack.embeddings for model in (self.generator, self.discriminator))
        for name in SHARED:
            setattr(ours, name, getattr(theirs, name, None))
        # files hold what is shared once
        self.register_state_dict_post_hook(lambda _, state, prefix, __: _drop_shared(state, prefix))
        self.register_load_state_dict_pre_hook(lambda _, state, prefix, *__: _add_shared(state, prefix))

    @property
    def words(self) -> Embedding:
        return self.discriminator.words

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes the discriminator to the directory, and the generator to its folder "generator"."""
        self.discriminator.save_pretrained(directory)
        self.generator.save_pretrained(Path(directory) / GENERATOR)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, *, rtd_weight: float = 50.0) -> Electra:
        """From what `save_pretrained` wrote."""
        both = {"discriminator": directory, "generator": Path(directory) / GENERATOR}
        parts = {name: Transformer.from_pretrained(path) for name, path in both.items()}
        electra = cls(parts["discriminator"].config, parts["generator"].config, rtd_weight=rtd_weight)
        for name, part in parts.items():
            getattr(electra, name).load_state_dict(part.state_dict())
        return electra.eval()

    def forward(
        self, input_ids: Tensor, labels: Tensor, *, num_items_in_batch: Mapping[str, Any] | None = None, **others: Any
    ) -> TransformerOutput:
        """A batch of masked tokens, as `Transformer` takes it.

        num_items_in_batch: {"tokens": labelled tokens, "read": all tokens} of the optimizer step; None: each loss is
        the mean over this batch's.

        Returns losses "mlm" and "rtd", their weighted sum, the discriminator's logits like input_ids, and which tokens
        were `replaced`. Samples are drawn from PyTorch's generator.
        """
        items: list[Any] = [None, None]
        if num_items_in_batch is not None:
            items = [num_items_in_batch["tokens"], num_items_in_batch["read"]]
        filled = self.generator(input_ids, labels=labels, num_items_in_batch=items[0], **others)
        replaced, is_replaced = self.replace(input_ids, labels, filled.last_hidden_state)
        if (mask := others.get("attention_mask")) is not None:
            is_replaced = is_replaced.masked_fill(mask == 0, IGNORED)
        found = self.discriminator(replaced, labels=is_replaced, num_items_in_batch=items[1], **others)
        losses = {**filled.losses, **found.losses}
        loss = losses["mlm"] + self.config.loss_weights["rtd"] * losses["rtd"]
        return TransformerOutput({"loss": loss, "logits": found.logits}, {"losses": losses, "replaced": is_replaced})

    @torch.no_grad()
    def replace(self, input_ids: Tensor, labels: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The text with samples in the predicted places, and for each token 1 where it is not the original.

        hidden: the generator's last hidden states.
        """
        predicted = labels != IGNORED
        head = self.generator.token_head
        assert head is not None
        samples = sample(head(hidden[predicted], self.generator.words.weight))
        original = torch.where(predicted, labels, input_ids)
        replaced = original.masked_scatter(predicted, samples.to(original.dtype))
        return replaced, (replaced != original).long()


def _drop_shared(state: dict[str, Tensor], prefix: str) -> None:
    for name in list(state):
        if name.startswith(tuple(f"{prefix}generator.{EMBEDDINGS}{part}." for part in SHARED)):
            del state[name]


def _add_shared(state: dict[str, Tensor], prefix: str) -> None:
    for name in list(state):
        if name.startswith(tuple(f"{prefix}discriminator.{EMBEDDINGS}{part}." for part in SHARED)):
            state[f"{prefix}generator." + name.removeprefix(f"{prefix}discriminator.")] = state[name]


def sample(logits: Tensor) -> Tensor:
    """(rows, vocabulary) -> (rows,): one draw from each softmax, by adding Gumbel noise (Maddison et al. 2014)."""
    logits = logits.float()
    # minus the logarithm of an exponential variable is a Gumbel one
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


def smaller(config: TransformerConfig, part: int = 4) -> TransformerConfig:
    """A generator with 1 / part of the features and heads, on embeddings of the same size."""
    fields = {name: max(1, getattr(config, name) // part) for name in ("d_model", "n_heads", "d_ff")}
    width = None if fields["d_model"] == config.embed_dim else config.embed_dim
    kv_heads = None if config.n_kv_heads is None else max(1, config.n_kv_heads // part)
    return config.replace(**fields, n_kv_heads=kv_heads, d_embed=width, objectives=["mlm"], loss_weights={})


def _with_head(config: TransformerConfig, objective: str) -> TransformerConfig:
    fields: dict[str, Any] = {"objectives": [objective], "pooler": "none", "loss_weights": {}}
    if objective == "mlm":
        # the head leads back to the embeddings' features
        fields |= {"head_transform": True, "head_bias": True, "tie_embeddings": True}
    return config.replace(**fields)
