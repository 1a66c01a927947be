"""What all commands share: how errors and warnings look, and the options they have in common."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Debug = Annotated[bool, typer.Option("--debug", envvar="LLMENGINE_DEBUG", help="Show the traceback of an error.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the config: data.batch_tokens=8192."),
]
ModelPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a model directory.")]

USER_ERROR, FAILURE = 2, 1


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are sentences on stderr: exit code 2 for what the user can mend, 1 for other failures."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                command(*args, debug=debug, **kwargs)
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:
                if debug:
                    raise
                mendable = isinstance(error, ValueError | OSError)
                kind = "error" if mendable else type(error).__name__
                typer.echo(f"{kind}: {str(error) or type(error).__name__}", err=True)
                if not mendable:
                    typer.echo("(--debug shows where)", err=True)
                raise typer.Exit(USER_ERROR if mendable else FAILURE) from None

    return run


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    typer.echo(f"warning: {message}", err=True)
