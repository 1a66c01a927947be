"""C++ programs of tests/csrc, compiled as the build compiles the kernels of an instruction set; with sanitizers where
LLMENGINE_TEST_SANITIZE names them (`make sanitize`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def flags_of(isa: str) -> list[str]:
    """The flags that CMakeLists.txt gives the kernels of an instruction set, the last where there is a choice."""
    found = re.findall(rf'add_kernels\({isa} "[^"]*"\s*([^)]*)\)', (ROOT / "CMakeLists.txt").read_text())
    assert found, f"CMakeLists.txt builds no kernels for {isa}"
    return found[-1].split()


def compiled(sources: list[str], program: Path, flags: list[str]) -> Path:
    """The sources, named from the repository's root, as a program; a warning is a failure."""
    assert COMPILER, "needs the C++ compiler that built llmengine: put it on PATH, or name it in CXX"
    options = ["-std=c++20", "-O2", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    if sanitizers := os.environ.get("LLMENGINE_TEST_SANITIZE"):
        options += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    command = [COMPILER, *options, *flags, *(str(ROOT / source) for source in sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def printed_by(program: Path, timeout: float = 240) -> str:
    """What a program prints; its exit code counts what failed."""
    done = subprocess.run([program], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
