"""Tasks about single letters, and models that learn them in seconds."""

from __future__ import annotations

import random

import tokenizers
from tokenizers import models, pre_tokenizers, processors

from llmengine import Transformer
from llmengine.data import Tokenizer
from llmengine.tasks import Task

from . import tiny

LETTERS = "abcdefghij"
ROLES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
SHAPE = {"d_model": 48, "n_heads": 4, "d_ff": 96}


def letter_tokenizer(template: str = "$A </s>", words: str = "") -> Tokenizer:
    """A token for each letter and each of `words`, all between spaces."""
    vocabulary = {token: i for i, token in enumerate([*ROLES.values(), *LETTERS, *words.split()])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.add_special_tokens(list(ROLES.values()))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in ROLES.values()]
    )
    return Tokenizer(backend, dict(ROLES))


def words_of_letters(count: int, longest: int, seed: int = 0) -> list[str]:
    """Different ones, such as "c a f"."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choice(LETTERS) for _ in range(draw.randint(2, longest)))] = None
    return list(found)


def model_of(task: Task, architecture: str, **fields) -> Transformer:
    tokenizer = task.tokenizer
    objectives = ["seq2seq" if architecture == "encoder_decoder" else "clm"]
    special = {
        "objectives": objectives,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    if architecture == "encoder_decoder" and "decoder_start_token_id" not in task.model_fields():
        special["decoder_start_token_id"] = tokenizer.pad_id
    shape = tiny.BOTH if architecture == "encoder_decoder" else tiny.DECODER
    return tiny.model_of(task, tokenizer, shape, **SHAPE | special | fields)
