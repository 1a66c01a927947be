"""Pretraining tasks: what each does to a corpus's tokens, as examples for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmengine.data.draws import check_seed
from llmengine.data.examples import Examples
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.bert import BertExamples
from llmengine.objectives.clm import ClmExamples
from llmengine.objectives.masking import option_names
from llmengine.objectives.mlm import MlmExamples

__all__ = ["OBJECTIVES", "build"]

# Any: each class takes its own Options
OBJECTIVES: dict[str, Any] = {
    "bert": BertExamples,
    "mlm": MlmExamples,
    "clm": ClmExamples,
}


def build(
    name: str, documents: Sequence[str], tokenizer: Tokenizer, *, sequence_length: int, seed: int, **options: Any
) -> Examples:
    """The examples of an objective over documents.

    name: "bert" (masked tokens and sentence pairs, Devlin et al. 2019), "mlm" (masked tokens only, Liu et al. 2019),
    "clm" (next token). sequence_length: the most tokens of an example, special tokens included. options: see
    `MlmExamples`, `BertExamples`. Raises ValueError naming what was given and what is allowed.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: {name!r} is not one of {', '.join(OBJECTIVES)}")
    allowed = option_names(OBJECTIVES[name].Options)
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"objective {name!r}: no option {', '.join(unknown)}; options: {', '.join(allowed) or 'none'}")
    check_seed(seed)
    return OBJECTIVES[name](documents, tokenizer, sequence_length, seed, OBJECTIVES[name].Options(**options))
