"""From text to packed batches: corpora, sentences, tokenizers, the batches of an optimizer step."""

from __future__ import annotations

from llmengine.data.batches import Step, StepBatches, loader
from llmengine.data.corpus import read_documents, split_documents
from llmengine.data.examples import Examples
from llmengine.data.tokenizer import Tokenizer

__all__ = ["Examples", "Step", "StepBatches", "Tokenizer", "loader", "read_documents", "split_documents"]
