"""The portable kernels by Clang, and on Arm: they are C++ of a vector extension that GCC and Clang share. All of it is
heavy, and needs `pip install ziglang`: a Clang with all that it takes to compile for other processors. What runs on Arm
needs `qemu-aarch64` as well, if this machine is none (Debian: qemu-user-static)."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
ARM = platform.machine() == "aarch64"
KERNELS = [*(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "csrc/cpu/kernels").glob("*.cpp")]
PROGRAMS = {
    "vec_math_test": [],
    "pair_tile_test": ["csrc/cpu/isa.cpp"],
    "gemm_test": ["csrc/cpu/kernels/gemm.cpp", "csrc/cpu/parallel.cpp", "csrc/cpu/isa.cpp"],
}
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs Clang: pip install ziglang"),
]


@pytest.fixture(scope="module")
def clang(tmp_path_factory):
    """Runs Clang with the flags that CMakeLists.txt gives the generic kernels; a warning is a failure."""
    cache = str(tmp_path_factory.mktemp("zig"))
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    flags = ["-std=c++20", "-O2", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Icsrc"]

    def run(target: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags, "-DLLMENGINE_ISA=generic"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-linux-gnu", "aarch64-macos"])
def test_every_kernel_compiles(target, clang, tmp_path):
    assert len(KERNELS) > 20
    for source in KERNELS:
        clang(target, "-c", str(source), "-o", str(tmp_path / "kernel.o"))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_programs_of_the_portable_path_pass(processor, name, clang, tmp_path):
    emulator = [] if processor == platform.machine() else [EMULATOR]
    if None in emulator or (ARM and processor == "x86_64"):
        pytest.skip(f"needs a processor of {processor}, or qemu-{processor}")
    program = tmp_path / name
    sources = [f"tests/csrc/{name}.cpp", *PROGRAMS[name]]
    clang(f"{processor}-linux-musl", "-static", *sources, "-o", str(program))
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:]
