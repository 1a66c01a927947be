"""The program `llmengine`. A command's libraries are imported when it runs, so that help comes at once."""

from __future__ import annotations

from typing import Annotated

import typer

import llmengine
from llmengine.cli import (
    bench,
    convert,
    evaluate,
    fill,
    finetune,
    generate,
    info,
    inspect,
    predict,
    tokenize,
    train,
    tune,
    verify,
)

app = typer.Typer(
    name="llmengine",
    help="Pretrain your own transformer and use it. Each command has examples: llmengine train --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)
COMMANDS = (train, finetune, tokenize, evaluate, predict, generate, fill, inspect, convert, verify, bench, tune, info)
for module in COMMANDS:
    name = module.__name__.rpartition(".")[2]
    app.command(name, epilog=f"\b\nExamples:\n{module.EXAMPLES}")(module.command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"llmengine {llmengine.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    app(prog_name="llmengine")
