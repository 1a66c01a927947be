"""Pretraining tasks: what each does to a corpus's tokens, as examples for the model."""

from __future__ import annotations

import os
from typing import Any

from llmengine.data.draws import check_seed
from llmengine.data.examples import Examples
from llmengine.data.shards import Corpus
from llmengine.data.tokenizer import Tokenizer
from llmengine.models import Transformer, TransformerConfig
from llmengine.objectives.bert import BertExamples
from llmengine.objectives.clm import ClmExamples
from llmengine.objectives.denoising import DenoisingExamples
from llmengine.objectives.electra import Electra, ElectraExamples, smaller
from llmengine.objectives.masking import option_names
from llmengine.objectives.mlm import MlmExamples
from llmengine.objectives.plm import PlmExamples
from llmengine.objectives.sop import SopExamples
from llmengine.objectives.span_corruption import SpanCorruptionExamples
from llmengine.objectives.tlm import TlmExamples

__all__ = [
    "OBJECTIVES",
    "build",
    "decoder_start",
    "load_model",
    "make_model",
    "memory_fields",
    "model_heads",
    "options_of",
]

# Any: each class takes its own Options
OBJECTIVES: dict[str, Any] = {
    "bert": BertExamples,
    "mlm": MlmExamples,
    "sop": SopExamples,
    "clm": ClmExamples,
    "denoising": DenoisingExamples,
    "span_corruption": SpanCorruptionExamples,
    "plm": PlmExamples,
    "electra": ElectraExamples,
    "tlm": TlmExamples,
}


def build(
    name: str, documents: Corpus, tokenizer: Tokenizer, *, sequence_length: int, seed: int, **options: Any
) -> Examples:
    """The examples of an objective over documents, or over shards of them that were tokenised before.

    name: "bert" (masked tokens and sentence pairs, Devlin et al. 2019), "mlm" (masked tokens only, Liu et al. 2019),
    "sop" (masked tokens and the order of sentences, Lan et al. 2019), "clm" (next token), "denoising" (a text from what
    noise left of it, Lewis et al. 2019), "span_corruption" (the spans that are missing, Raffel et al. 2020), "plm"
    (tokens in a random order, Yang et al. 2019), "electra" (replaced tokens, Clark et al. 2020), "tlm" (masked tokens
    of texts and their translations, Conneau & Lample 2019: documents are `data.Pairs`).
    sequence_length: the most tokens of an example, special tokens included; of an encoder-decoder on either side.
    options: those of the objective's class, such as `MlmExamples`.

    Raises ValueError naming what was given and what is allowed.
    """
    chosen = options_of(name, **options)
    check_seed(seed)
    return OBJECTIVES[name](documents, tokenizer, sequence_length, seed, chosen)


def options_of(name: str, **options: Any) -> Any:
    """An objective's options, checked, with defaults where none are given."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective: {name!r} is not one of {', '.join(OBJECTIVES)}")
    allowed = option_names(OBJECTIVES[name].Options)
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"objective {name!r}: no option {', '.join(unknown)}; options: {', '.join(allowed) or 'none'}")
    return OBJECTIVES[name].Options(**options)


def model_heads(name: str) -> tuple[str, ...]:
    """The `objectives` of the model that a run's config describes."""
    return OBJECTIVES[name].model_heads or OBJECTIVES[name].heads


def memory_fields(name: str, **options: Any) -> dict[str, int]:
    """The model's fields that an objective with memory decides; none without."""
    if not options.get("memory"):
        return {}
    chosen = options_of(name, **options)
    return {"memory_length": chosen.memory, "memory_reuse": chosen.reuse}


def make_model(name: str, config: TransformerConfig, **options: Any) -> Transformer | Electra:
    """A new model for an objective's examples: a Transformer, or, for "electra", two of them."""
    if name != "electra":
        return Transformer(config)
    chosen = options_of(name, **options)
    return Electra(config, smaller(config, chosen.generator_part), rtd_weight=chosen.rtd_weight)


def load_model(name: str, directory: str | os.PathLike, **options: Any) -> Transformer | Electra:
    """What such a model's save_pretrained wrote."""
    if name != "electra":
        return Transformer.from_pretrained(directory)
    return Electra.from_pretrained(directory, rtd_weight=options_of(name, **options).rtd_weight)


def decoder_start(name: str, **options: Any) -> str | None:
    """The role ("bos", "eos", "pad") of the token that an encoder-decoder's target begins with; None: no decoder."""
    start = OBJECTIVES[name].decoder_start
    return start and getattr(options_of(name, **options), "decoder_start", start)
