"""`llmengine tune`: measures tiles of the Triton kernels on this GPU, beside those of the built-in tables."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmengine.cli.common import Debug, reported

if TYPE_CHECKING:
    from llmengine.backends.triton.tuning import Found, Problem

EXAMPLES = (
    "  llmengine tune                                   all tables, for 10 minutes at most\n"
    "  llmengine tune --operator attention --seconds 3600\n"
    "  LLMENGINE_TUNED= llmengine train ...             for once without what was found"
)
OPERATORS = ("attention", "products", "rows", "relative")


@reported
def command(
    operator: Annotated[
        list[str] | None,
        typer.Option(
            help="attention, products (of ffn and linear_cross_entropy), rows (of norms, softmax, cross_entropy and"
            " embedding), or relative (attention of XLNet and Transformer-XL); repeatable. Default: all."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Stop when a slot would begin later than this.")] = 600.0,
    output: Annotated[Path | None, typer.Option(help="The file; default: where the kernels look for it.")] = None,
    debug: Debug = False,
) -> None:
    """Find faster tiles for this GPU.

    Goes through the places of the Triton kernels' tables, measures the neighbours of each tile beside it, and writes
    what was faster to a file that the kernels read from then on ($LLMENGINE_TUNED, or in ~/.cache/llmengine).
    """
    names = operator or list(OPERATORS)
    for name in names:
        if name not in OPERATORS:
            raise ValueError(f"--operator {name}: allowed are {', '.join(OPERATORS)}")
    _require_gpu()

    import torch

    from llmengine.backends.triton import tuned, tuning

    device = torch.device("cuda", torch.cuda.current_device())
    path = output or tuned.path_for(device)
    if path is None:
        raise ValueError(f"--output is needed, since {tuned.VARIABLE} is empty")
    typer.echo(f"{tuned.origin(device)['device']}: {path}")
    begun = time.perf_counter()
    with torch.no_grad():
        tune(_problems(names, device), path, device, tuning.medians, lambda: time.perf_counter() - begun > seconds)


def tune(problems: Iterator[Problem], path: Path, device: Any, measure: Any, expired: Any) -> None:
    """Searches slot by slot until the time has expired, from what the file has; it is written anew after each."""
    import torch

    from llmengine.backends.triton import tuned, tuning

    tiles = _known(path, device)
    tuned.write(path, device, tiles)  # whether it can be written is known before anything is measured
    tuned.forget()
    done = improved = 0
    for problem in problems:
        if expired():
            typer.echo(f"stopped before {problem.slot}: the time is over (--seconds)")
            break
        before = tiles.get(problem.slot)
        known = before and problem.built_in._replace(**{name: before[name] for name in problem.built_in._fields})
        try:
            found = tuning.search(problem, measure, expired, known, lambda what: typer.echo(f"  {what}"))
        except torch.AcceleratorError:
            raise
        except tuning.FAILURES as error:
            typer.echo(f"{problem.slot}: skipped, for its built-in tile fails: {tuning.reason_of(error)}")
            continue
        done, improved = done + 1, improved + found.improved
        tiles.pop(found.slot, None)
        if found.improved:
            tiles[found.slot] = found.record()
        tuned.write(path, device, tiles)
        typer.echo(_line(found))
    tuned.forget()
    typer.echo(f"{improved} of {done} tiles are faster than built in; written: {path}")


def _problems(names: list[str], device: Any) -> Iterator[Problem]:
    from llmengine.backends.triton import tuning_problems

    place = tuning_problems.Place.on(device)
    for name in names:
        yield from tuning_problems.PROBLEMS[name](place)


def _known(path: Path, device: Any) -> dict[str, dict[str, Any]]:
    """What an earlier run found; nothing where its file is not to be used."""
    from llmengine.backends.triton import tuned

    try:
        return tuned.read(path, device)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        typer.echo(f"replaced: {error}")
        return {}


def _require_gpu() -> None:
    from llmengine.backends.triton.device import INTERPRETED, unavailable

    reason = "TRITON_INTERPRET is set, and an interpreter has no speed" if INTERPRETED else unavailable()
    if reason:
        raise ValueError(f"tune needs a GPU that Triton compiles for (NVIDIA from Ampere on, AMD CDNA3): {reason}")


def _line(found: Found) -> str:
    from llmengine.backends.triton.tuning import text_of

    before = f"{found.slot:34} {found.built_in_ms:9.3f} ms ({text_of(found.built_in)})"
    if not found.improved:
        return f"{before}: kept"
    return f"{before} -> {found.ms:.3f} ms ({text_of(found.tile)}), {found.built_in_ms / found.ms:.2f}x"
