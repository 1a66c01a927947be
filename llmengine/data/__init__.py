"""From text to packed batches: corpora, sentences, tokenizers, the batches of an optimizer step."""

from __future__ import annotations

from llmengine.data.batches import Step, StepBatches, loader
from llmengine.data.corpus import iterate_documents, read_documents, split_documents
from llmengine.data.examples import Examples
from llmengine.data.pairs import Pairs, read_pairs
from llmengine.data.rows import iterate_rows, read_rows
from llmengine.data.shard_writer import write_shards
from llmengine.data.shards import Corpus, Shards, open_shards, read_corpus, split_corpus
from llmengine.data.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "Examples",
    "Pairs",
    "Shards",
    "Step",
    "StepBatches",
    "Tokenizer",
    "iterate_documents",
    "iterate_rows",
    "loader",
    "open_shards",
    "read_corpus",
    "read_documents",
    "read_pairs",
    "read_rows",
    "split_corpus",
    "split_documents",
    "write_shards",
]
