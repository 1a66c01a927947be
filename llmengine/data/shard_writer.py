"""From documents to a tokenised corpus on disk, a shard at a time; what was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmengine.data.sentences import split_sentences
from llmengine.data.shards import (
    INDEX,
    TOKENIZER,
    UNFINISHED,
    Index,
    Shard,
    Shards,
    arrays_of,
    is_shards,
    open_shard,
    open_shards,
)  # fmt: skip
from llmengine.data.tokenizer import FILE, Tokenizer
from llmengine.data.tokens import BLOCK, Tokens, offsets, tokenize
from llmengine.files import replace_text, sha256, sync

SHARD_TOKENS = 2**26
Progress = Callable[[int, int], None]


def write_shards(
    documents: Iterable[str], tokenizer: Tokenizer, directory: str | os.PathLike, *, sentences: bool = False,
    words: bool = False, shard_tokens: int = SHARD_TOKENS, resume: bool = False, replace_old: bool = False,
    progress: Progress = lambda read, tokens: None,
) -> Shards:  # fmt: skip
    """Tokenises documents into a directory, in their order, holding no more than a shard of them in memory.

    sentences: segments are sentences, for "bert" and "sop"; else documents, each with the end token after it if the
    tokenizer has one. words: also tell where words begin. shard_tokens: a shard ends with the documents, some of which
    are tokenised at a time, that reach so many tokens. progress: called with documents read and tokens written so far.

    What is in the directory from an interrupted call is gone on with (resume: the same arguments and documents) or
    replaced, and so is a finished corpus (replace_old). Raises ValueError before anything is written.
    """
    directory = Path(directory)
    if shard_tokens < 1:
        raise ValueError(f"shards: shard_tokens must be 1 or more, got {shard_tokens}")
    done = _begin(directory, resume, replace_old)
    if done is None:
        tokenizer.save(directory / TOKENIZER)
    index = Index(
        tokenizer=sha256(directory / TOKENIZER / FILE),
        sentences=sentences,
        words=words,
        end=None if sentences else tokenizer.eos_id,
        dtype=np.min_scalar_type(tokenizer.vocab_size).name,
        shards=done.shards if done else (),
    )
    left = iter(documents)
    if done is not None:
        if done != index or tokenizer.digest != Tokenizer.load(directory / TOKENIZER).digest:
            raise ValueError(
                f"shards: {directory} was begun with another tokenizer, --sentences or --words; resume with the same, "
                "or start again (--force)"
            )
        for shard in done.shards:
            open_shard(directory, index, shard)
            _skip(left, shard, directory)
    _write_index(directory / UNFINISHED, index)
    while (written := _next_shard(left, tokenizer, index, shard_tokens, directory, progress)) is not None:
        index = replace(index, shards=(*index.shards, written))
        _write_index(directory / UNFINISHED, index)
    if not index.shards:
        raise ValueError(f"shards: the documents for {directory} hold no token; give more text")
    _write_index(directory / INDEX, index)
    (directory / UNFINISHED).unlink()
    return open_shards(directory)


def _begin(directory: Path, resume: bool, replace_old: bool) -> Index | None:
    """What an interrupted call has done, if it is to go on; the directory is then as it left it, else empty."""
    if resume and replace_old:
        raise ValueError("shards: go on with what is there (resume), or replace it: not both")
    unfinished = (directory / UNFINISHED).is_file() and not (directory / INDEX).is_file()
    if resume and unfinished:
        _remove(directory, ".[0-9]*.npy.*")  # what a killed process was writing
        return Index.read(directory / UNFINISHED)
    if is_shards(directory):
        if not replace_old:
            what = "a corpus half-way; go on with it (--resume), or" if unfinished else "a corpus;"
            raise FileExistsError(f"shards: {directory} holds {what} replace it (--force)")
        _clear(directory)
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"shards: {directory} holds something else; give a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    return None


def _clear(directory: Path) -> None:
    """Removes a corpus. What tells that it is one goes last."""
    if (directory / INDEX).is_file():
        (directory / INDEX).replace(directory / UNFINISHED)
    _remove(directory, "[0-9]*.npy")
    _remove(directory, ".[0-9]*.npy.*")
    (directory / UNFINISHED).unlink()


def _remove(directory: Path, pattern: str) -> None:
    for path in directory.glob(pattern):
        path.unlink()


def _write_index(path: Path, index: Index) -> None:
    replace_text(path, json.dumps(index.to_dict(), indent=1) + "\n")


# ---- a shard ---------------------------------------------------------------------------------------------------------


class _Read:
    """Documents as they are read: how many, and the digest of their texts."""

    def __init__(self) -> None:
        self.count = 0
        self._digest = hashlib.sha256()

    def __call__(self, document: str) -> None:
        data = document.encode("utf-8")
        self.count += 1
        # with its length, so that no two lists of documents are alike
        self._digest.update(len(data).to_bytes(8, "little") + data)

    @property
    def text(self) -> str:
        return self._digest.hexdigest()


def _skip(documents: Iterator[str], shard: Shard, directory: Path) -> None:
    """Passes over the documents of a shard that is there."""
    read = _Read()
    for document in documents:
        read(document)
        if read.count == shard.read:
            break
    if read.text != shard.text:
        raise ValueError(
            f"shards: the corpus has changed since {directory} was begun: shard {shard.name} is of another text; start "
            "again (--force)"
        )


def _next_shard(
    documents: Iterator[str], tokenizer: Tokenizer, index: Index, size: int, directory: Path, progress: Progress
) -> Shard | None:
    """Writes the next shard; None where no document with a token is left."""
    read, parts, tokens = _Read(), [], 0
    read_before, tokens_before = (sum(getattr(s, name) for s in index.shards) for name in ("read", "tokens"))
    while tokens < size and (block := _block(documents, read, size)):
        segments = map(split_sentences, block) if index.sentences else ([document] for document in block)
        parts.append(tokenize(segments, tokenizer, end=index.end, words=index.words))
        tokens += len(parts[-1].ids)
        progress(read_before + read.count, tokens_before + tokens)
    if not tokens:
        return None
    whole = _joined(parts)
    name = f"{len(index.shards):05d}"
    files = {}
    for array in arrays_of(index):
        path = directory / f"{name}.{array}.npy"
        _save(path, np.asarray(getattr(whole, array)))
        files[path.name] = [path.stat().st_size, sha256(path)]
    return Shard(name, read.count, len(whole.documents) - 1, len(whole.bounds) - 1, tokens, read.text, files)


def _block(documents: Iterator[str], read: _Read, most: int) -> list[str]:
    """Documents that are tokenised at a time."""
    block, size = [], 0
    for document in documents:
        read(document)
        block.append(document)
        size += len(document)
        if size >= min(BLOCK, most):
            break
    return block


def _joined(parts: list[Tokens]) -> Tokens:
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        offsets(np.concatenate([np.diff(part.bounds) for part in parts])),
        offsets(np.concatenate([np.diff(part.documents) for part in parts])),
        None if parts[0].words is None else np.concatenate([part.words for part in parts]),
    )


def _save(path: Path, array: np.ndarray) -> None:
    """Writes an array's file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
