"""What all commands share: how errors and warnings look, and the options they have in common."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from llmengine.training.sections import Config

Debug = Annotated[bool, typer.Option("--debug", envvar="LLMENGINE_DEBUG", help="Show the traceback of an error.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the config: data.batch_tokens=8192."),
]
ModelPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a model directory.")]

ConfigPath = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A .yaml or .toml file.")]
Resume = Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run folder.")]

USER_ERROR, FAILURE = 2, 1
SIGNALS = {"SIGINT": 2, "SIGTERM": 15}
C = TypeVar("C", bound="Config")


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
                typer.echo(f"{kind}: {_sentence(error)}", err=True)
                if not mendable:
                    typer.echo("(--debug shows where)", err=True)
                raise typer.Exit(USER_ERROR if mendable else FAILURE) from None

    return run


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # the system's own
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error) or type(error).__name__


def program() -> str:
    """How this program is called here: by its name where the shell finds it, and else as it was called."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return "python -m llmengine"
    return "llmengine" if shutil.which("llmengine") or called.name != "llmengine" else str(called)


def as_overrides(flags: Mapping[str, Any]) -> list[str]:
    """Flags that were given (not None), by the config's fields, as overrides."""
    # JSON is YAML: quoted, no text means anything else
    return [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]


def one_or_several(given: list[str] | None) -> str | list[str] | None:
    """An option that may be repeated."""
    return given[0] if given and len(given) == 1 else given or None


def resumed(kind: type[C], config: Path | None, output: Path | None, run: Path, overrides: Sequence[str]) -> C:
    """The config with which a run goes on. config, output: what was given beside --resume."""
    from llmengine.training import config_file
    from llmengine.training.run import Folder

    for name, given in (("a config file", config), ("--output", output)):
        if given is not None:
            raise ValueError(f"--resume {run} goes on with that folder's own config.yaml: leave out {name} ({given})")
    path = Folder(run).config
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {run} is no run folder: it has no {path.name}")
    other = {"task": "finetune", "objective": "train"}
    for field in other.keys() - kind.model_fields.keys():
        if field in config_file.read(path):
            raise ValueError(f"--resume: {run} is a run of llmengine {other[field]}; go on with that")
    return kind.from_file(path, overrides)


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    typer.echo(f"warning: {message}", err=True)
