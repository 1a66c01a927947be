"""Tokenizers: WordPiece as BERT's, byte-level BPE as GPT-2's, or any Hugging Face tokenizer directory."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llmengine.data import tokenizer_files
from llmengine.data.special_tokens import AROUND, FAMILIES, SENTINEL, SENTINELS, WORDPIECE
from llmengine.data.template import Template
from llmengine.data.textfiles import SURROGATE
from llmengine.data.tokenizer_files import CONFIG, FILE, around, wordpiece_backend
from llmengine.files import replace_text

# scripts that are written without spaces between words: kana, Chinese characters
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
COVERED = 0.999  # of a corpus's characters must be in a WordPiece vocabulary; the rest may become [UNK]


class Tokenizer:
    """Text to token ids and back. `roles` gives special tokens by role: {"mask_token": "[MASK]", ...}."""

    def __init__(self, backend: tokenizers.Tokenizer, roles: dict[str, str], config: dict[str, Any] | None = None):
        # a file may ask for padding or truncation of every text: here lengths are the caller's business
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.roles = roles
        self._config = config or {}
        for role, token in roles.items():
            if backend.token_to_id(token) is None:
                raise ValueError(f"Tokenizer: {role} {token!r} is not in the vocabulary")

    # ---- making, saving, loading -------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls, documents: Sequence[str], kind: str = "wordpiece", vocab_size: int = 8000, lowercase: bool = True,
        *, family: str = "gpt2",
    ) -> Tokenizer:  # fmt: skip
        """A tokenizer learnt from documents; the same documents always give the same one.

        kind: "wordpiece" (Devlin et al. 2019) with [PAD] [UNK] [CLS] [SEP] [MASK]; "bpe" (byte-level, Radford et al.
        2019) with <|endoftext|>. vocab_size: the most tokens; a small text may not have as many. lowercase (which
        strips accents too) is for wordpiece only: byte-level BPE gives every text back as it was. family: whose special
        tokens "bpe" has: "gpt2", "bart", "t5" (with 100 sentinels at the end), "xlnet".
        """
        if kind not in ("wordpiece", "bpe"):
            raise ValueError(f'Tokenizer.train: kind must be "wordpiece" or "bpe", got {kind!r}')
        if family not in FAMILIES:
            raise ValueError(f"Tokenizer.train: family {family!r} is not one of {', '.join(FAMILIES)}")
        if not any(document.strip() for document in documents):
            raise ValueError("Tokenizer.train: documents hold no text")
        if kind == "bpe":
            return cls(_train_bpe(documents, vocab_size, family), dict(FAMILIES[family]))
        # what transformers is to return for a text or a pair
        config = {"do_lower_case": lowercase, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        return cls(_train_wordpiece(documents, vocab_size, lowercase), dict(WORDPIECE), config)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """From a Hugging Face directory, or from one of a tokenizer's files: see tokenizer_files.py.

        Raises FileNotFoundError, or ValueError naming the file.
        """
        backend, roles, config = tokenizer_files.load(Path(path))
        return cls(backend, roles, config)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes a directory that transformers.AutoTokenizer loads; each file is replaced whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # the general class reads tokenizer.json as it is; a family's own class would build another from its parts
        types = ["token_type_ids"] if self.token_types else []
        config = {
            "model_input_names": ["input_ids", *types, "attention_mask"], **self._config, **self.roles,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }  # fmt: skip
        replace_text(directory / FILE, self.backend.to_str(pretty=True))
        replace_text(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    # ---- ids ---------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides ids: tokenizers with the same one give every text the same ids."""
        state = json.loads(self.backend.to_str())
        if state["model"]["type"] == "Unigram":
            # the library reads a score that it wrote with an error in its last digit
            state["model"]["vocab"] = [(token, f"{score:.9g}") for token, score in state["model"]["vocab"]]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def _id(self, role: str) -> int | None:
        return self.backend.token_to_id(self.roles[role]) if role in self.roles else None

    @property
    def pad_id(self) -> int | None:
        return self._id("pad_token")

    @property
    def unk_id(self) -> int | None:
        return self._id("unk_token")

    @property
    def cls_id(self) -> int | None:
        return self._id("cls_token")

    @property
    def sep_id(self) -> int | None:
        return self._id("sep_token")

    @property
    def mask_id(self) -> int | None:
        return self._id("mask_token")

    @property
    def bos_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of all special tokens, rising."""
        marked = [token_id for token_id, token in self.backend.get_added_tokens_decoder().items() if token.special]
        of_roles = [self.backend.token_to_id(token) for token in self.roles.values()]
        return tuple(sorted({*marked, *(token_id for token_id in of_roles if token_id is not None)}))

    @property
    def sentinel_ids(self) -> list[int]:
        """T5's sentinels, in the order in which they stand for the spans of a text."""
        ids = (self.backend.token_to_id(SENTINEL.format(i)) for i in count())
        return list(takewhile(lambda i: i is not None, ids))  # type: ignore[arg-type]

    @property
    def token_types(self) -> bool:
        """Whether models of this vocabulary's family read token types (segments), as far as its files tell: in BERT's
        and XLNet's they count from 0 in the first text of a pair, in GPT's, T5's and RoBERTa's there are none."""
        if "model_input_names" in self._config:
            return "token_type_ids" in self._config["model_input_names"]
        return self.cls_id is not None and any(part.type for part in self.template(pair=True).parts)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of its conversations, if it brings one; of several the one named "default"."""
        template = self._config.get("chat_template")
        if isinstance(template, list):
            template = next((each["template"] for each in template if each.get("name") == "default"), None)
        return template

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none added. A special token written out in it ("[MASK]") is that token: text for prompts."""
        if SURROGATE.search(text):  # what a shell passes on of bytes that are no UTF-8
            raise ValueError(f"Tokenizer.encode: {text[:60]!r} has half a surrogate pair, which is no character")
        self.backend.encode_special_tokens = False
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, none added, on all cores. No text gives a special token: text for training."""
        self.backend.encode_special_tokens = True
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_words(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """`encode_many`, and for each text a bool array: which tokens begin a word of the pre-tokenizer's.

        Chinese and Japanese have no spaces: there every token begins a word that does not go on with a character, so
        that words are characters (WordPiece), or what the vocabulary has joined (byte-level BPE, SentencePiece).
        """
        self.backend.encode_special_tokens = True
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, _begins(e, text)) for e, text in zip(encodings, texts, strict=True)]

    def encodings(self, texts: Sequence[Any], *, words: bool = False) -> list[tokenizers.Encoding]:
        """Each text (words=True: list of words) with offsets and words of its tokens, none added. No text gives a
        special token."""
        self.backend.encode_special_tokens = True
        return self.backend.encode_batch(list(texts), is_pretokenized=words, add_special_tokens=False)

    def template(self, pair: bool = False) -> Template:
        """What models of this tokenizer's family read around a text, or around a pair of texts."""
        return Template.of(self.backend.encode("a", "a" if pair else None))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """How the vocabulary writes a token."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            raise ValueError(f"Tokenizer.token: {token_id} is not in [0, {self.vocab_size})")
        return token


def _begins(encoding: tokenizers.Encoding, text: str) -> np.ndarray:
    """(tokens,) bool: which tokens begin a word."""
    # a token that belongs to no word counts as one
    words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
    begins = np.diff(words, prepend=-2) != 0
    if UNSPACED.search(text):
        end = 0
        for i, (start, stop) in enumerate(encoding.offsets):
            # bytes of one character may be several tokens
            begins[i] |= start >= end and UNSPACED.search(text, max(start - 1, 0), start + 1) is not None
            end = stop
    return begins


# ---- training --------------------------------------------------------------------------------------------------------


def _train_bpe(documents: Sequence[str], vocab_size: int, family: str) -> tokenizers.Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = list(dict.fromkeys(FAMILIES[family].values()))  # a token may have two roles
    sentinels = [SENTINEL.format(i) for i in reversed(range(SENTINELS))] if family == "t5" else []
    fixed = len(alphabet) + len(specials) + len(sentinels)
    if vocab_size <= fixed:
        raise ValueError(
            f"Tokenizer.train: vocab_size {vocab_size} is too small; byte-level BPE needs {len(alphabet)} bytes, "
            f"{', '.join(specials)}{f', {len(sentinels)} sentinels' if sentinels else ''} and some merges: "
            f"{fixed + len(alphabet) - 1} or more"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(sentinels), special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents, trainer, length=len(documents))
    backend.add_special_tokens(sentinels)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if family in AROUND:
        backend.post_processor = around(backend, *AROUND[family])
    return backend


def _train_wordpiece(documents: Sequence[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    specials = list(WORDPIECE.values())
    backend = wordpiece_backend(models.WordPiece(unk_token=WORDPIECE["unk_token"]), lowercase)
    alphabet, inner = _alphabet(documents, backend, vocab_size)
    # The trainer numbers the characters inside words in the order of a randomly seeded hash table, and breaks ties
    # by number. Given as special tokens they are numbered before; a new tokenizer then knows the true specials only.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=specials + inner, initial_alphabet=alphabet,
        limit_alphabet=len(alphabet), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(documents, trainer, length=len(documents))
    vocabulary = backend.get_vocab(with_added_tokens=True)
    backend = wordpiece_backend(models.WordPiece(vocabulary, unk_token=WORDPIECE["unk_token"]), lowercase)
    backend.add_special_tokens(specials)
    backend.post_processor = around(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return backend


def _alphabet(documents: Sequence[str], backend: tokenizers.Tokenizer, vocab_size: int) -> tuple[list[str], list[str]]:
    """The characters that get a token, and "##" forms of those that can continue a word.

    The most frequent ones first, until they cover the text and fill half of the vocabulary.
    """
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(backend.normalizer.normalize_str(document))
    ranked = sorted((-n, c) for c, n in counts.items() if not c.isspace())
    total = -sum(n for n, _ in ranked)
    alphabet: list[str] = []
    inner: list[str] = []
    covered = 0
    for n, character in ranked:
        if covered >= COVERED * total and len(alphabet) + len(inner) >= vocab_size // 2:
            break
        covered -= n
        alphabet.append(character)
        inside = backend.normalizer.normalize_str(f"a{character}a")
        if len(backend.pre_tokenizer.pre_tokenize_str(inside)) == 1:
            inner.append(f"##{character}")
    needed = len(WORDPIECE) + len(alphabet) + len(inner)
    if needed >= vocab_size:
        raise ValueError(
            f"Tokenizer.train: vocab_size {vocab_size} is too small: the special tokens and the characters of this "
            f"corpus alone are {needed}; give {2 * needed} or more"
        )
    return sorted(alphabet), sorted(inner)
