"""`llmengine bench`: how fast the operators run on this machine, beside PyTorch and beside the machine's limits."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmengine.cli.common import Debug, reported

if TYPE_CHECKING:
    from llmengine.roofline import Ceilings

EXAMPLES = (
    "  llmengine bench                                  every operator, about 5 minutes\n"
    "  llmengine bench attention ffn --dtype bf16       two operators in one dtype\n"
    "  llmengine bench --no-compile --seconds 60        without torch.compile, cut after a minute"
)
DTYPES = ("fp32", "bf16", "fp16")


@reported
def command(
    operators: Annotated[list[str] | None, typer.Argument(help="Operators; all if none is named.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16, fp16; repeatable. Default: fp32 and bf16, bf16 on a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")] = True,
    seconds: Annotated[float, typer.Option(help="Stop before a case that would begin later than this.")] = 420.0,
    output: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("runs/bench"),
    goals: Annotated[
        bool, typer.Option("--goals", help="The larger shapes of products that goals name; a GPU.")
    ] = False,
    small: Annotated[bool, typer.Option("--small", help="Tiny shapes: shows that it runs, and no speed.")] = False,
    debug: Debug = False,
) -> None:
    """Time the operators beside PyTorch.

    Measures how fast this machine copies and multiplies, then each operator, forward and forward + backward, beside
    PyTorch eager and torch.compile, as times and as percent of the limit. Writes bench.json and a roofline plot.
    """
    from llmengine import roofline
    from llmengine.files import replace_text

    place = _device(device)
    names = _known("operators", operators, list(roofline.OPERATORS)) or list(roofline.OPERATORS)
    chosen = _known("--dtype", dtype, list(DTYPES)) or list(DTYPES[:2] if place == "cpu" else DTYPES[1:2])
    if goals and (small or place == "cpu"):
        raise ValueError("--goals: shapes for a GPU, without --small")
    shapes = "small" if small else "goals" if goals else place
    if nothing := [name for name in operators or [] if not roofline.SHAPES[shapes].get(roofline.OPERATORS[name][0])]:
        raise ValueError(f"operators: {', '.join(nothing)}: there are no shapes for it here, which are {shapes!r}")
    with _threads(threads):
        facts = roofline.machine(place)
        typer.echo(_where(facts))
        result, ceilings = _measured(place, names, chosen, compiled, seconds, shapes)
    output.mkdir(parents=True, exist_ok=True)
    replace_text(output / "bench.json", json.dumps({"machine": facts, **result}, indent=1) + "\n")
    roofline.draw(result["rows"], ceilings, output / "bench.png", _where(facts))
    if result["cut"]:
        typer.echo(f"stopped: {result['cut']} (--seconds)")
    typer.echo("(x: the peer's time over ours; above 1 llmengine is faster)")
    typer.echo(f"written: {output / 'bench.json'}, {output / 'bench.png'}")


def _measured(
    place: str, names: list[str], chosen: list[str], compiled: bool, seconds: float, shapes: str
) -> tuple[dict[str, Any], Ceilings]:
    """Ceilings, rows, and before what the time ran out; each row is printed as it comes."""
    from llmengine import roofline

    start = time.perf_counter()
    dtypes = [dtype for name in chosen for dtype, known in roofline.NAMES.items() if known == name]
    if place == "cpu":
        roofline.keep_freed_memory()
    clock = roofline.Clock(place)
    ceilings = roofline.measure_ceilings(clock, dtypes, shapes == "small")
    typer.echo(_limits(ceilings.as_json()))
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"ceilings": ceilings.as_json(), "rows": rows, "cut": None}
    for name, dtype in itertools.product(names, dtypes):
        for case in roofline.cases(shapes, place, dtype, [name]):
            if time.perf_counter() - start > seconds:
                result["cut"] = f"{seconds:.0f} s are over before {name} {case.name} {roofline.NAMES[dtype]}"
                return result, ceilings
            measured = list(roofline.measure(case, clock, ceilings, compiled=compiled))
            rows += measured
            for line in roofline.lines(measured):
                typer.echo(line)
    return result, ceilings


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise ValueError(f"--threads {count}: must be at least 1")
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(given: str) -> str:
    import torch

    if given not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {given}: allowed are auto, cpu, cuda")
    if given == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    return ("cuda" if torch.cuda.is_available() else "cpu") if given == "auto" else given


def _known(argument: str, given: list[str] | None, allowed: list[str]) -> list[str]:
    for name in given or []:
        if name not in allowed:
            raise ValueError(f"{argument}: {name!r} is unknown; allowed are {', '.join(allowed)}")
    return given or []


def _where(facts: dict[str, Any]) -> str:
    place = facts.get("device") or f"{facts['processor']}, {facts['threads']} threads, kernels {facts['cpu_isa']}"
    return f"{place}; torch {facts['torch']}, llmengine {facts['llmengine']} ({facts['commit'] or 'no checkout'})"


def _limits(ceilings: dict[str, Any]) -> str:
    rates = ", ".join(f"{dtype} {rate:.3f} TFLOP/s" for dtype, rate in ceilings["tflops"].items())
    return f"limits measured here: copy {ceilings['gbytes_per_s']:.1f} GB/s; {rates}"
