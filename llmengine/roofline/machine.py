"""What a record of times must say of where they were taken."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import llmengine
from llmengine.backends.cuda.native import PRODUCTS
from llmengine.ops.registry import report

ROOT = Path(llmengine.__file__).parent.parent


def machine(device: str = "cpu") -> dict[str, Any]:
    """Commit (of a checkout; None elsewhere), versions, and what was timed: "device", the processor or GPU."""
    facts = {
        "commit": _commit(), "llmengine": llmengine.__version__, "torch": torch.__version__,
        "python": platform.python_version(), "processor": processor(), "threads": torch.get_num_threads(),
        "cpu_isa": report()["cpu_isa"], "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    facts["device"] = facts["processor"]
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
                  "memory": p.total_memory, "cuda": torch.version.cuda,
                  "products": os.environ.get(PRODUCTS) or "blas"}  # fmt: skip
    return facts


def processor() -> str:
    """The CPU's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return asked.stdout.strip() or None
