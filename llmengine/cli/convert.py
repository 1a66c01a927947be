"""`llmengine convert`: a checkpoint of any supported toolkit as a model directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from llmengine.cli import models
from llmengine.cli.common import Debug, reported

EXAMPLES = """\
  llmengine convert bert-base-uncased/ my-bert --family custom
  llmengine convert checkpoint_best.pt my-bart --family bart
  llmengine convert model_step_100000.pt my-translator"""
# What a directory's tokenizer is made of, in transformers' names.
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model source.spm target.spm"
).split()


@reported
def command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help=models.READABLE)],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The directory to write.")],
    family: Annotated[
        str | None,
        typer.Option(help='The layout: "custom" (our own), or a Hugging Face model_type. Default: as it was read.'),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in an existing DIRECTORY.")] = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint.

    Reads SOURCE and writes it as a model directory, with its tokenizer where it has one.
    """
    if directory.exists() and not force:
        raise FileExistsError(f"{directory} exists already; give another directory, or --force to replace its model")
    source = models.weights_of(source)
    model = models.read(source, dtype)
    typer.echo(f"read   {source}: {models.describe(model)}")
    if family is not None:
        model.config = model.config.replace(family=family)
    model.save_pretrained(directory)
    tokenizer = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for file in tokenizer:
        if not (directory / file.name).is_file() or not file.samefile(directory / file.name):
            shutil.copyfile(file, directory / file.name)
    layout = "llmengine's own layout" if model.config.family == "custom" else f"Hugging Face's {model.config.family}"
    with_it = f", with {', '.join(file.name for file in tokenizer)}" if tokenizer else ""
    typer.echo(f"wrote  {directory}: {layout}{with_it}")
