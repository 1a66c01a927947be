"""Builds the native modules with CMake and ninja; everything else is in pyproject.toml.

Environment: LLMENGINE_CUDA=auto|1|wheels|0 (auto: build the CUDA kernels, which take minutes, where nvcc and an NVIDIA
driver are found; wheels: by NVIDIA's compiler from PyPI, build_backend.py), MAX_JOBS, CMAKE_ARGS. PyTorch is not needed
to build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

import build_backend

ROOT = Path(__file__).resolve().parent
COMPILER = "CMAKE_CUDA_COMPILER:"  # in CMake's cache
TOOLS = ("CMAKE_MAKE_PROGRAM:", "CMAKE_COMMAND:", "pybind11_DIR:", COMPILER)


class CMakeBuild(build_ext):
    def run(self) -> None:
        package = Path(self.get_ext_fullpath("llmengine._cpu")).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        wanted, nvcc = cuda_wanted()
        forget_other_tools(build, nvcc)
        # An absolute path: an isolated build finds ninja in an environment that is gone afterwards.
        ninja = shutil.which("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("llmengine: cmake was not found; pip install cmake ninja")
        subprocess.run(
            [cmake, "-S", str(ROOT), "-B", str(build), *generator,
             f"-DPython_EXECUTABLE={sys.executable}",
             f"-Dpybind11_DIR={pybind11_directory()}",
             f"-DCMAKE_INSTALL_PREFIX={package}",
             f"-DLLMENGINE_CUDA={wanted}",
             *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
             *os.environ.get("CMAKE_ARGS", "").split()],
            check=True,
        )  # fmt: skip
        subprocess.run([cmake, "--build", str(build), "--parallel", str(jobs()), "--target", "install"], check=True)


def cuda_wanted() -> tuple[str, Path | None]:
    """CMake's word for LLMENGINE_CUDA, and the compiler where it is not CMake that looks for one."""
    given = build_backend.cuda_asked()
    words = {"auto": "AUTO", "1": "ON", "on": "ON", "wheels": "ON", "0": "OFF", "off": "OFF"}
    if given not in words:
        raise SystemExit(f"llmengine: LLMENGINE_CUDA={given} is not one of auto, 1, wheels, 0")
    return words[given], build_backend.nvcc() if given == "wheels" else None


def pybind11_directory() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


def forget_other_tools(build: Path, nvcc: Path | None) -> None:
    """Configures afresh where a cached tool belonged to a build environment that no longer exists, or another nvcc than
    the given one was at work."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return
    for line in cache.read_text().splitlines():
        key, _, value = line.partition("=")
        tool = Path(value)
        if not (key.startswith(TOOLS) and tool.is_absolute()):
            continue
        if not tool.exists() or (key.startswith(COMPILER) and nvcc not in (None, tool)):
            shutil.rmtree(build)
            return


def jobs() -> int:
    """Parallel compilers: as many as there are cores, but none without about 1 GiB of memory."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    except (ValueError, OSError):
        free_gib = cores
    return max(1, min(cores, int(free_gib)))


setup(ext_modules=[Extension("llmengine._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
