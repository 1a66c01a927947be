"""Tokenizers of five families, from small trained files: transformers' own, and ours of the directory they write."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers

from llmengine.data import Tokenizer

KINDS = ("bert", "roberta", "xlnet", "t5", "gpt2")


@dataclass(frozen=True)
class Both:
    theirs: transformers.PreTrainedTokenizerBase
    ours: Tokenizer


@pytest.fixture(scope="session")
def of_family(novels, wordpiece, tmp_path_factory) -> dict[str, Both]:
    bpe = _model(Tokenizer.train(novels, "bpe", 1000, family="bart").backend)
    merges = [tuple(merge) for merge in bpe["merges"]]
    marks = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]
    theirs = {
        "bert": transformers.BertTokenizerFast(vocab=_model(wordpiece.backend)["vocab"]),
        "roberta": transformers.RobertaTokenizerFast(vocab=bpe["vocab"], merges=merges),
        "xlnet": transformers.XLNetTokenizerFast(vocab=_unigram(novels, marks)),
        "t5": transformers.T5TokenizerFast(vocab=_unigram(novels, ["<pad>", "</s>", "<unk>"]), extra_ids=3),
        "gpt2": transformers.GPT2TokenizerFast(vocab={**bpe["vocab"], "<|endoftext|>": 1000}, merges=merges),
    }
    made = {}
    for name, tokenizer in theirs.items():
        directory = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(directory)
        made[name] = Both(tokenizer, Tokenizer.load(directory))
    return made


def _model(backend: tokenizers.Tokenizer) -> dict:
    return json.loads(backend.to_str())["model"]


def _unigram(documents: list[str], specials: list[str]) -> list[tuple[str, float]]:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([document[:20_000] for document in documents], trainer)
    return [(piece, score) for piece, score in _model(backend)["vocab"]]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Steps this small are all barriers with two threads on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
