"""The build backend of pyproject.toml: setuptools', and with LLMENGINE_CUDA=wheels NVIDIA's compiler from PyPI.

The wheels are then requirements of the build: pip brings them to an isolated one, of which nothing stays, and `nvcc`
finds them there, or in the environment of a build without isolation. They lay one toolkit, nvidia/cu13, among packages.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay setuptools'

TOOLKIT = "nvidia/cu13"
# The wheels that csrc/cuda takes to compile and link, each with a file by which it is known. CUDA 12's have no nvcc.
WHEELS = {
    "nvidia-cuda-nvcc": "bin/nvcc",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "lib/libcudart_static.a",
}


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + compiler_requirements()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + compiler_requirements()


def cuda_asked() -> str:
    return os.environ.get("LLMENGINE_CUDA", "auto").lower()


def compiler_requirements() -> list[str]:
    return [requirement(name) for name in WHEELS] if cuda_asked() == "wheels" else []


def requirement(wheel: str) -> str:
    return f"{wheel}==13.*"


def nvcc() -> Path:
    """The compiler of the wheels."""
    toolkits = {Path(folder) / TOOLKIT: missing(Path(folder) / TOOLKIT) for folder in sys.path}
    toolkit = min(toolkits, key=lambda place: len(toolkits[place]))
    if lacking := toolkits[toolkit]:
        raise SystemExit(
            f"llmengine: LLMENGINE_CUDA=wheels, but there is no {', '.join(lacking)} in this environment; "
            f"pip install {' '.join(repr(requirement(name)) for name in lacking)}"
        )
    return toolkit / WHEELS["nvidia-cuda-nvcc"]


def missing(toolkit: Path) -> list[str]:
    """The wheels that it lacks."""
    return [name for name, part in WHEELS.items() if not (toolkit / part).exists()]
