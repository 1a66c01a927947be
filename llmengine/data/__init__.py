"""From text to packed batches: corpora, sentences, tokenizers, the batches of an optimizer step."""

from __future__ import annotations

from llmengine.data.batches import Step, StepBatches, loader
from llmengine.data.corpus import iterate_documents, read_documents, split_documents
from llmengine.data.examples import Examples
from llmengine.data.rows import iterate_rows, read_rows
from llmengine.data.tokenizer import Tokenizer

__all__ = [
    "Examples",
    "Step",
    "StepBatches",
    "Tokenizer",
    "iterate_documents",
    "iterate_rows",
    "loader",
    "read_documents",
    "read_rows",
    "split_documents",
]
