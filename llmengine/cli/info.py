"""`llmengine info`: this machine, and which backend can run which operator on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Annotated, Any

import typer

from llmengine.cli.common import Debug, reported

EXAMPLES = "  llmengine info\n  llmengine info --json"


@reported
def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False, debug: Debug = False
) -> None:
    """Describe this machine.

    Versions, processor, GPUs, memory, and which backend has a kernel for which operator.
    """
    facts = gather()
    typer.echo(json.dumps(facts, indent=2) if as_json else describe(facts))


def gather() -> dict[str, Any]:
    import torch

    import llmengine
    from llmengine.ops.registry import report
    from llmengine.roofline import processor

    registry = report()
    return {
        "versions": {
            "llmengine": llmengine.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version("triton"),
            "transformers": _version("transformers"),
        },
        "platform": platform.platform(),
        "cpu": {
            "model": processor(),
            "logical_cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "threads": torch.get_num_threads(),
            "instruction_sets": registry["cpu_isas_supported"],
            "active_instruction_set": registry["cpu_isa"],
            "notice": registry["cpu_isa_notice"],
        },
        "memory_gib": _memory_gib(),
        "gpus": [_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())],
        "demanded_backend": os.environ.get("LLMENGINE_BACKEND") or None,
        "operators": registry["operators"],
        "backends": registry["backends"],
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for a person."""
    cpu = facts["cpu"]
    sets = ", ".join(cpu["instruction_sets"]) or "no native module"
    active = f" (active: {cpu['active_instruction_set']})" if cpu["active_instruction_set"] else ""
    memory = "unknown" if facts["memory_gib"] is None else f"{facts['memory_gib']:.1f} GiB"
    gpus = "; ".join(f"{g['name']}, {g['memory_gib']:.1f} GiB, sm_{g['capability']}" for g in facts["gpus"]) or "none"
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)),
        ("platform", facts["platform"]),
        ("cpu", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['logical_cores']} logical cores usable"),
        ("kernels", sets + active),
        *([("notice", cpu["notice"])] if cpu["notice"] else []),
        ("threads", str(cpu["threads"])),
        ("memory", memory),
        ("gpus", gpus),
    ]
    if facts["demanded_backend"]:
        rows.append(("demanded", f"LLMENGINE_BACKEND={facts['demanded_backend']}: no other backend runs"))
    lines = [f"{name:10}{value}" for name, value in rows]
    return "\n".join([*lines, "", *_table(facts["operators"], facts["backends"])])


def _table(operators: list[str], backends: dict[str, dict[str, Any]]) -> list[str]:
    """operator x backend; the reasons of what is missing stand below."""
    width = max(map(len, operators)) + 2
    lines = ["operator".ljust(width) + "".join(f"{name:11}" for name in backends)]
    for operator in operators:
        cells = ("yes" if _usable(operator, backend) else "-" for backend in backends.values())
        lines.append((operator.ljust(width) + "".join(f"{cell:11}" for cell in cells)).rstrip())
    lines.append("")
    for name, backend in backends.items():
        missing = [operator for operator in operators if operator not in backend["operators"]]
        if backend["unavailable"]:
            lines.append(f"{name}: {backend['unavailable']}")
        elif missing:
            lines.append(f"{name}: no kernel for {', '.join(missing)}")
    lines.append(
        "Of these, the first backend of a device that takes the arguments runs; llmengine.explain tells which."
    )
    return lines


def _usable(operator: str, backend: dict[str, Any]) -> bool:
    return backend["unavailable"] is None and operator in backend["operators"]


# ---- the machine -----------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):  # not told on this system
        return None


def _gpu(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "capability": f"{properties.major}{properties.minor}",
    }
