"""Builds the simulator of CUDA kernels (csrc/sim) with CMake, where the sources are at hand."""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

PACKAGE = Path(importlib.import_module("llmengine").__file__ or "").resolve().parent
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"sim-{sys.implementation.cache_tag}"
SCHEDULES = ("forward", "reversed", "round_robin", "random", "starved")


def prepare(test: str, schedules: tuple[str, ...] = SCHEDULES) -> None:
    """Backend cuda_sim for a test: each has a schedule of its own, and always the same one."""
    ready()
    number = zlib.crc32(test.encode())
    importlib.import_module("llmengine._cuda_sim").set_schedule(schedules[number % len(schedules)], number)


@functools.cache
def ready() -> None:
    """Builds `llmengine._cuda_sim` if its sources changed, and lets backend cuda_sim use it."""
    from llmengine.ops import registry

    module = f"_cuda_sim{sysconfig.get_config_var('EXT_SUFFIX')}"
    built, place = build("_cuda_sim") / module, PACKAGE / module
    if not place.exists() or place.stat().st_mtime_ns < built.stat().st_mtime_ns:
        if "llmengine._cuda_sim" in sys.modules:
            raise RuntimeError("llmengine._cuda_sim was loaded before it was built anew: run once more")
        shutil.copy2(built, f"{place}.new")
        os.replace(f"{place}.new", place)  # a process that has it open keeps the old one
    registry._loaded.pop("cuda_sim", None)  # it may have been asked for before


def build(target: str) -> Path:
    """Builds one of CMake's targets and returns the folder that it lies in. One process at a time."""
    import pybind11

    if not (ROOT / "csrc" / "sim").is_dir():
        raise RuntimeError("the simulator is built from llmengine's sources: run the tests in a checkout")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DLLMENGINE_SIM=ON", "-DLLMENGINE_CUDA=OFF",
             f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")  # fmt: skip
        _run("cmake", "--build", str(BUILD), "--target", target)
    return BUILD / "csrc" / "sim"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-6000:]}")
