"""SentencePiece models (Kudo & Richardson 2018; *.model, *.spm) as a `tokenizers` backend, without that library.

A model is a Protocol Buffers message of pieces, their scores and types, and a table of normalisation. Unigram models
(Kudo 2018) and BPE are read. The ids are those of SentencePieceProcessor.encode, except that

- a mark that combines with the character before it is dropped where the table replaces that character and has no rule
  for both together (an accent after a full-width letter or a space): so the library of the backend reads the table;
- of two ways to divide a text whose scores are equal the other one may be taken ("--" "-", or "-" "--");
- in a text that spells out a control piece ("<s>") of a unigram model, no piece crosses one place within it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"
# roles of control pieces that a model does not name as its unknown, beginning, end or padding
ROLES = {
    "[CLS]": "cls_token", "[SEP]": "sep_token", "[MASK]": "mask_token", "<cls>": "cls_token", "<sep>": "sep_token",
    "<mask>": "mask_token", "<pad>": "pad_token",
}  # fmt: skip


@dataclass(frozen=True)
class SentencePiece:
    """The fields of a model that decide what `encode` gives. pieces: (text, score, type), by id."""

    pieces: list[tuple[str, float, int]]
    kind: int = UNIGRAM
    ids: dict[str, int] = field(default_factory=dict)  # role: id, -1 where it has none
    name: str = ""
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_spaces: bool = True
    escape: bool = True
    space_is_suffix: bool = False

    @classmethod
    def read(cls, path: Path) -> SentencePiece:
        """Raises ValueError for a file that is none, or of which a part is missing."""
        try:
            return cls._parse(path.read_bytes())
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(f"Tokenizer.load: {path} is no SentencePiece model: {error}") from None

    @classmethod
    def _parse(cls, data: bytes) -> SentencePiece:
        """sentencepiece_model.proto: 1 pieces, 2 the trainer's settings, 3 the normaliser's."""
        pieces, trainer, normaliser = [], {}, {}
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), _float(piece.get(2, b"\0" * 4)), piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normaliser = dict(_fields(value))
        if not pieces:
            raise ValueError("it has no pieces")
        ids = {"unk_token": trainer.get(40, 0), "bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}
        ids["pad_token"] = trainer.get(43, -1)
        return cls(
            pieces=pieces,
            kind=trainer.get(3, UNIGRAM),
            ids={role: _signed(i) for role, i in ids.items()},
            name=normaliser.get(1, b"").decode(),
            charsmap=normaliser.get(2, b""),
            dummy_prefix=bool(normaliser.get(3, True)),
            remove_spaces=bool(normaliser.get(4, True)),
            escape=bool(normaliser.get(5, True)),
            space_is_suffix=bool(trainer.get(24, False)),
        )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a Protocol Buffers message: an int, or the bytes of a string, message or float."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind, size = key & 7, 0
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"byte {at} begins a field of type {kind}")
        if at + size > len(data):
            raise ValueError("it is truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("it is truncated")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _float(data: bytes) -> float:
    return struct.unpack("<f", data)[0]


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# ---- the backend -----------------------------------------------------------------------------------------------------


def load(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A model's backend, and its special tokens by role."""
    model = SentencePiece.read(path)
    problem = _unsupported(model)
    if problem:
        raise ValueError(
            f"Tokenizer.load: {path} {problem}, which is not read; let transformers write it as tokenizer.json: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    bytes_too = any(kind == BYTE for _, _, kind in model.pieces)
    unknown = model.pieces[model.ids["unk_token"]][0]
    if model.kind == UNIGRAM:
        backend = tokenizers.Tokenizer(models.Unigram(_scores(model), model.ids["unk_token"], bytes_too))
    else:
        vocabulary = {text: i for i, (text, _, _) in enumerate(model.pieces)}
        bpe = models.BPE(vocabulary, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=bytes_too)
        backend = tokenizers.Tokenizer(bpe)
    if steps := _normalizers(model):
        backend.normalizer = normalizers.Sequence(steps)
    if splits := _splits(model):
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else [])
    )
    backend.add_special_tokens([text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)])
    if model.kind == BPE:
        symbols = [AddedToken(text, normalized=False) for text, _, kind in model.pieces if kind == USER_DEFINED]
        backend.add_tokens(symbols)
    roles = {ROLES[text]: text for text, _, kind in model.pieces if text in ROLES and kind in (CONTROL, USER_DEFINED)}
    named = {role: model.pieces[i][0] for role, i in model.ids.items() if 0 <= i < len(model.pieces)}
    return backend, roles | named


def _unsupported(model: SentencePiece) -> str:
    """What a model has that no backend gives exactly."""
    kinds = {kind for _, _, kind in model.pieces}
    if model.kind not in (UNIGRAM, BPE):
        return "is neither a unigram nor a BPE model"
    if not 0 <= model.ids["unk_token"] < len(model.pieces):
        return "has no unknown piece"
    if UNUSED in kinds:
        return "has pieces that are not to be used"
    if not model.escape or model.space_is_suffix:
        return "writes spaces in an unusual way"
    if model.kind == BPE and USER_DEFINED in kinds and model.dummy_prefix:
        return "has user-defined symbols in a BPE model with a prefix"
    return ""


def _scores(model: SentencePiece) -> list[tuple[str, float]]:
    """Pieces with the scores by which paths are compared: a user-defined symbol wins over all that it could be."""
    best = max((score for _, score, kind in model.pieces if kind == NORMAL), default=0.0)
    return [(text, len(text) * best - 0.1 if kind == USER_DEFINED else score) for text, score, kind in model.pieces]


def _merges(model: SentencePiece) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the piece of the highest score first."""
    scores = {text: score for text, score, kind in model.pieces if kind == NORMAL}
    found = [
        (-score, text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda each: each[0])]


def _normalizers(model: SentencePiece) -> list[Any]:
    steps: list[Any] = []
    if model.charsmap:
        # tables of NFKC have rules for characters that combine into one, of which the backend would look up the first
        # alone and drop the rest: they are combined before
        steps = [normalizers.NFC()] if "nfkc" in model.name else []
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_spaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_spaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return steps


def _splits(model: SentencePiece) -> list[Any]:
    """Where texts are split before pieces are looked for: at words, if no piece goes on after a word's end; and within
    control pieces that a text spells out, which the text of a Unigram model would else give.
    """
    splits = []
    usual = [text for text, _, kind in model.pieces if kind in (NORMAL, USER_DEFINED)]
    if not any(SPACE in text.lstrip(SPACE) for text in usual):
        splits.append(pre_tokenizers.Split(Regex(f"{SPACE}+"), "merged_with_next"))
    if model.kind == UNIGRAM:
        hidden = [text for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL, BYTE) and len(text) > 1]
        splits.append(parting(hidden, set(usual)))
    return splits


def parting(hidden: Iterable[str], usual: Container[str]) -> Any:
    """What splits a text within the hidden pieces that it spells out. usual: the pieces that texts give."""
    pattern = "|".join(_tail(text, usual) for text in hidden)
    return pre_tokenizers.Split(Regex(pattern), "merged_with_next")


def _tail(text: str, known: Container[str]) -> str:
    """A pattern of a text's end after its beginning: parted beside a known character, as unknown ones are joined."""
    places = range(1, len(text))
    at = next((i for i in places if text[i - 1] in known or text[i] in known), 1)
    return f"(?<={re.escape(text[:at])}){re.escape(text[at:])}"
