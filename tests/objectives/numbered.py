"""Documents whose every word is a token of its own, so that an id tells document and place."""

from __future__ import annotations

from tokenizers import models

from llmengine.data import Tokenizer
from llmengine.data.special_tokens import WORDPIECE
from llmengine.data.tokenizer_files import wordpiece_backend

FIRST = 5  # ids below are special


def numbered(sizes: list[list[int]]) -> tuple[list[str], Tokenizer, list[range]]:
    """Documents of paragraphs with these numbers of words; their tokenizer; and each document's ids."""
    words, documents, spans = [], [], []
    for paragraphs in sizes:
        start = len(words)
        text = []
        for size in paragraphs:
            new = [f"w{i}" for i in range(len(words), len(words) + size)]
            words += new
            text.append(" ".join(new))
        documents.append("\n\n".join(text))
        spans.append(range(FIRST + start, FIRST + len(words)))
    tokens = [*WORDPIECE.values(), *words, "[EOS]"]
    backend = wordpiece_backend(
        models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"), lowercase=True
    )
    return documents, Tokenizer(backend, WORDPIECE | {"eos_token": "[EOS]"}), spans


def document_of(ids: list[int], spans: list[range]) -> int:
    """The document that these ids are a contiguous part of."""
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    (document,) = [d for d, span in enumerate(spans) if ids[0] in span]
    assert ids[-1] in spans[document]
    return document
