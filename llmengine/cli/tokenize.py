"""`llmengine tokenize`: a corpus larger than memory as token ids on disk, for `train --corpus`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmengine.cli.common import Debug, program, reported

if TYPE_CHECKING:
    from llmengine.data.shard_writer import Progress

EXAMPLES = """\
  llmengine tokenize my_texts/ --tokenizer my-tokenizer/ --output my_tokens
  llmengine tokenize a.jsonl b.jsonl.gz --tokenizer runs/bert/model --output my_tokens --sentences
  llmengine tokenize big.txt --documents paragraph --tokenizer gpt2/ --output my_tokens --resume"""
SECONDS_BETWEEN_LINES = 5.0


@reported
def command(
    corpus: Annotated[
        list[str], typer.Argument(metavar="CORPUS…", help='Text or JSON-lines files, folders of such, or "austen".')
    ],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer's directory or file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.")],
    documents: Annotated[
        str, typer.Option(help="What a document of a .txt file is: file (all of it), paragraph or line.")
    ] = "file",
    sentences: Annotated[
        bool, typer.Option("--sentences", help="Sentences as segments: for the objectives bert and sop.")
    ] = False,
    words: Annotated[
        bool, typer.Option("--words", help="Tell where words begin: for plm, denoising, whole words and spans.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted call has written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the tokenised corpus in the directory.")] = False,
    debug: Debug = False,
) -> None:
    """Tokenize a corpus for training.

    Documents are read one by one, so that the corpus may be larger than memory; so may what is written.
    """
    from llmengine.data import Tokenizer, iterate_documents, write_shards

    texts = iterate_documents(corpus, unit=documents)
    with _progress() as progress:
        shards = write_shards(
            texts, Tokenizer.load(tokenizer), output, sentences=sentences, words=words, resume=resume,
            replace_old=force, progress=progress,
        )  # fmt: skip
    index = shards.index
    read, kept = (sum(getattr(shard, name) for shard in index.shards) for name in ("read", "documents"))
    empty = f" ({read - kept:,} without a token are left out)" if read > kept else ""
    segments = f", {len(shards.tokens.bounds) - 1:,} sentences" if sentences else ""
    size = sum(size for shard in index.shards for size, _ in shard.files.values())
    typer.echo(
        f"{len(shards):,} documents{empty}{segments}, {len(shards.tokens.ids):,} tokens of {index.dtype}, "
        f"{size / 2**20:,.1f} MiB in {len(index.shards):,} shard{'s' if len(index.shards) > 1 else ''}\n"
        f"next      {program()} train --corpus {output} --objective {'bert' if sentences else 'clm'}"
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """What `write_shards` calls: a line that is rewritten on a terminal, a line now and then elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    start = printed = time.monotonic()
    before: int | None = None
    with console.status("reading") if console.is_terminal else _nothing() as status:

        def progress(read: int, tokens: int) -> None:
            nonlocal printed, before, start
            now = time.monotonic()
            if before is None:  # what was there before is passed over faster than it was tokenised
                before, start = tokens, now
            speed = f", {(tokens - before) / (now - start):,.0f} tokens/s" if now > start else ""
            line = f"{read:,} documents, {tokens:,} tokens{speed}"
            if status is not None:
                status.update(line)
            elif now - printed >= SECONDS_BETWEEN_LINES:
                printed = now
                console.print(line, highlight=False, soft_wrap=True)

        yield progress


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
