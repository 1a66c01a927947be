"""A tokenised corpus on disk, which may be larger than memory: opened, held out, and given to objectives.

A directory holds index.json, the tokenizer, and shards of whole documents, each up to four NumPy files: 00000.ids.npy,
….bounds.npy, ….documents.npy and ….words.npy, as `Tokens` has them. The index is written last: without it a conversion
has not finished (shard_writer.py). Arrays are mapped into memory: what is trained on is read. Only bounds are joined in
memory where there are several shards, or documents are held out: 8 bytes a segment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmengine.data.corpus import SMALL, check_fraction, read_documents, split_documents
from llmengine.data.draws import Draws, Purpose
from llmengine.data.pairs import Pairs, read_pairs
from llmengine.data.pieces import Pieces
from llmengine.data.sentences import split_sentences
from llmengine.data.tokenizer import FILE, Tokenizer
from llmengine.data.tokens import Tokens, offsets, shortened, tokenize
from llmengine.files import read_json, sha256

INDEX, UNFINISHED, TOKENIZER = "index.json", "unfinished.json", "tokenizer"
FORMAT, VERSION = "llmengine tokens", 1


@dataclass(frozen=True)
class Shard:
    """read: documents of the corpus, of which `documents` have a token. text: the SHA-256 of what was read.

    files: {name: [bytes, SHA-256]}.
    """

    name: str
    read: int
    documents: int
    segments: int
    tokens: int
    text: str
    files: dict[str, list[Any]]


@dataclass(frozen=True)
class Index:
    """What index.json says. tokenizer: the digest of the tokenizer's file in the directory.

    sentences: segments are sentences, not documents. words: it is told where words begin. end: the token after each
    segment, or None. dtype: of the ids.
    """

    tokenizer: str
    sentences: bool
    words: bool
    end: int | None
    dtype: str
    shards: tuple[Shard, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Index:
        fields = read_json(path, "shards")
        found = fields.pop("format", None), fields.pop("version", None)
        if found != (FORMAT, VERSION):
            raise ValueError(
                f"shards: {path} is of format {found[0]!r}, version {found[1]!r}; this program reads {FORMAT!r}, "
                f"version {VERSION}: tokenize the corpus again"
            )
        try:
            return cls(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"shards: {path} is damaged: {error}; tokenize the corpus again") from None


@dataclass(frozen=True)
class Shards:
    """A tokenised corpus, or a part of its documents."""

    directory: Path
    index: Index
    tokens: Tokens

    def __len__(self) -> int:
        """Documents."""
        return len(self.tokens.documents) - 1

    @property
    def digest(self) -> str:
        """Of the whole corpus, as it was tokenised."""
        return sha256(self.directory / INDEX)

    def split(self, fraction: float, seed: int) -> tuple[Shards, Shards]:
        """(train, held_out), the latter whole documents with about `fraction` of the tokens, chosen by seed alone.

        Documents of more than a fifth of the held-out part are never held out: it would depend on them.
        """
        check_fraction("Shards.split", fraction)
        sizes = np.diff(self.tokens.bounds[self.tokens.documents])
        wanted = fraction * int(sizes.sum())
        order = Draws(seed, 0, Purpose.SPLIT).order(len(sizes))
        order = order[sizes[order] <= SMALL * wanted]
        held = np.cumsum(sizes[order])
        count = int(held.searchsorted(wanted)) + 1
        if fraction and (count > len(order) or count == len(sizes)):
            raise ValueError(
                f"shards: {self.directory} has {len(sizes):,} documents of up to {int(sizes.max()):,} tokens, too few "
                f"or too large to hold out {fraction:.3g} of their {int(sizes.sum()):,} tokens; hold out nothing (0), "
                "or tokenize with smaller documents (llmengine tokenize --documents paragraph, or JSON lines)"
            )
        chosen = np.zeros(len(sizes), bool)
        chosen[order[: count if fraction else 0]] = True
        return self._select(~chosen), self._select(chosen)

    def _select(self, chosen: np.ndarray) -> Shards:
        """The documents of which it is true: (documents,) bool."""
        tokens = self.tokens
        segments = np.diff(tokens.documents)
        lengths = np.diff(tokens.bounds)[np.repeat(chosen, segments)]
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)
        ranges = tokens.bounds[tokens.documents[edges]]
        return replace(
            self,
            tokens=Tokens(
                _pieces(tokens.ids).take(ranges),
                offsets(lengths),
                offsets(segments[chosen]),
                None if tokens.words is None else _pieces(tokens.words).take(ranges),
            ),
        )

    def tokens_for(
        self, tokenizer: Tokenizer, *, sentences: bool, longest: int | None, end: int | None, words: bool
    ) -> Tokens:
        """What `corpus_tokens` gives of the corpus's text, if it was tokenised for that."""
        problem = self._mismatch(tokenizer, sentences=sentences, end=end, words=words)
        if problem:
            raise ValueError(f"shards: {self.directory} {problem}")
        stored = self.index.end is not None
        tokens = replace(self.tokens, words=self.tokens.words if words else None, tail=int(stored and end is None))
        return tokens if longest is None else shortened(tokens, longest)

    def _mismatch(self, tokenizer: Tokenizer, *, sentences: bool, end: int | None, words: bool) -> str:
        if tokenizer.digest != Tokenizer.load(self.directory / TOKENIZER).digest:
            return (
                f"was tokenised by another tokenizer than the model's; use {self.directory / TOKENIZER} "
                "(tokenizer.path), or tokenize the corpus again"
            )
        if sentences != self.index.sentences:
            one, other, remedy = (
                ("documents", "sentences", "with") if sentences else ("sentences", "documents", "without")
            )
            return f"has {one} as segments, but this objective takes {other}: tokenize again {remedy} --sentences"
        if words and not self.index.words:
            return "does not tell where words begin, which this objective asks for: tokenize again with --words"
        if end not in (None, self.index.end):
            return f"has {self.index.end} after each document, but this objective wants {end}: tokenize again"
        return ""


Corpus = Sequence[str] | Shards | Pairs


def corpus_tokens(
    corpus: Corpus, tokenizer: Tokenizer, *, sentences: bool = False, longest: int | None = None,
    end: int | None = None, words: bool = False,
) -> Tokens:  # fmt: skip
    """A corpus's tokens, documents without one left out.

    sentences: segments are sentences; else whole documents. longest: longer segments are cut. end: a token after each
    segment. words: also tell where words begin. Raises ValueError where shards were made by another tokenizer or lack
    what is asked for.
    """
    if isinstance(corpus, Pairs):
        raise ValueError("corpus: pairs of texts are for objective 'tlm'; give documents")
    if isinstance(corpus, Shards):
        return corpus.tokens_for(tokenizer, sentences=sentences, longest=longest, end=end, words=words)
    segments = map(split_sentences, corpus) if sentences else ([document] for document in corpus)
    return tokenize(segments, tokenizer, longest=longest, end=end, words=words)


def read_corpus(source: str | Path | Sequence[str | Path], *, pairs: bool = False) -> Corpus:
    """`read_documents`, or, where the only source is a directory of shards, `open_shards`; or `read_pairs`."""
    if pairs:
        return read_pairs(source)
    if (directory := shards_of(source)) is not None:
        return open_shards(directory)
    sources = [source] if isinstance(source, str | Path) else list(source)
    if tokenised := [each for each in sources if is_shards(each)]:
        raise ValueError(
            f"corpus: {tokenised[0]} is tokenised: a tokenised corpus stands alone; tokenize the {len(sources)} "
            "sources together"
        )
    return read_documents(sources)


def shards_of(source: Any) -> Path | None:
    """The directory of shards that a source is, if it is one."""
    if isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    return Path(source) if isinstance(source, str | Path) and is_shards(source) else None


def split_corpus(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """(train, held_out), as `split_documents`, `Shards.split` or `Pairs.split`."""
    if isinstance(corpus, Shards | Pairs):
        return corpus.split(fraction, seed)
    return split_documents(corpus, fraction, seed)


def is_shards(directory: str | os.PathLike) -> bool:
    """Whether a directory is a tokenised corpus, finished or not."""
    directory = Path(directory)
    return (directory / TOKENIZER).is_dir() and any((directory / name).is_file() for name in (INDEX, UNFINISHED))


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_shards(directory: str | os.PathLike, *, verify: bool = False) -> Shards:
    """A tokenised corpus, its arrays mapped into memory.

    verify: read all of it and compare its digests, which finds what a failing disk has damaged; the files' sizes and
    the arrays' shapes are always compared. Raises FileNotFoundError or ValueError, naming the file.
    """
    directory = Path(directory)
    if not (directory / INDEX).is_file():
        if (directory / UNFINISHED).is_file():
            raise ValueError(
                f"shards: {directory} is not finished: tokenizing it was interrupted; go on with it "
                "(llmengine tokenize --resume), or start again (--force)"
            )
        raise FileNotFoundError(f"shards: {directory} has no {INDEX}; give a directory that llmengine tokenize wrote")
    index = Index.read(directory / INDEX)
    _check_file(directory / TOKENIZER / FILE, None, index.tokenizer)
    shards = [open_shard(directory, index, shard, verify=verify) for shard in index.shards]
    arrays = {name: [shard[name] for shard in shards] for name in arrays_of(index)}
    if len(shards) == 1:
        return Shards(directory, index, Tokens(**{name: array for name, (array,) in arrays.items()}))
    return Shards(
        directory,
        index,
        Tokens(
            ids=Pieces(arrays["ids"]),
            bounds=_joined(arrays["bounds"]),
            documents=_joined(arrays["documents"]),
            words=Pieces(arrays["words"]) if index.words else None,
        ),
    )


def _joined(bounds: Sequence[np.ndarray]) -> np.ndarray:
    return offsets(np.concatenate([np.diff(each) for each in bounds]))


def _pieces(array: np.ndarray | Pieces) -> Pieces:
    return array if isinstance(array, Pieces) else Pieces([array])


def arrays_of(index: Index) -> dict[str, str]:
    """The arrays of a shard, and their dtypes."""
    always = {"ids": index.dtype, "bounds": "int64", "documents": "int64"}
    return always | ({"words": "bool"} if index.words else {})


def open_shard(directory: Path, index: Index, shard: Shard, *, verify: bool = False) -> dict[str, Any]:
    """A shard's arrays by name, checked as `open_shards` says."""
    lengths = {"bounds": shard.segments + 1, "documents": shard.documents + 1}
    arrays = {}
    for name, dtype in arrays_of(index).items():
        path = directory / f"{shard.name}.{name}.npy"
        size, digest = shard.files.get(path.name, (None, None))
        _check_file(path, size, digest if verify else None)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"shards: {path} is damaged: {error}") from None
        if array.dtype != dtype or array.shape != (lengths.get(name, shard.tokens),):
            raise ValueError(
                f"shards: {path} is of another conversion: it has {array.shape} of {array.dtype}, but the index says "
                f"({lengths.get(name, shard.tokens)},) of {dtype}"
            )
        # a plain array over the mapping: a slice of it is one too
        arrays[name] = np.asarray(array)
    if arrays["bounds"][-1] != shard.tokens or arrays["documents"][-1] != shard.segments:
        raise ValueError(f"shards: {directory / shard.name}.* are damaged: their bounds do not end where the tokens do")
    return arrays


def _check_file(path: Path, size: int | None, digest: str | None) -> None:
    """That a file is there, has its size (None: any), and its digest (None: not read)."""
    if not path.is_file():
        raise FileNotFoundError(f"shards: {path} is missing; copy the whole directory, or tokenize the corpus again")
    if size is not None and (found := path.stat().st_size) != size:
        raise ValueError(
            f"shards: {path} has {found:,} bytes, but was written with {size:,}: it is truncated or damaged"
        )
    if digest is not None and sha256(path) != digest:
        raise ValueError(f"shards: {path} is not as it was written: its SHA-256 differs")
