"""The accuracy that csrc/cpu/vec_math.h states, on every instruction set of the machine: a compiled sweep of floats."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmengine import _cpu

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def flags_of(isa: str) -> list[str]:
    """The flags that CMakeLists.txt gives the kernels of an instruction set."""
    found = re.search(rf"add_kernels\({isa}\s*([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found, f"CMakeLists.txt builds no kernels for {isa}"
    return found[1].split()


@pytest.mark.parametrize("isa", _cpu.supported_isas())
def test_vector_functions_are_as_accurate_as_they_say(isa: str, tmp_path: Path):
    assert COMPILER, "needs the C++ compiler that built llmengine: put it on PATH, or name it in CXX"
    source, program = ROOT / "tests/csrc/vec_math_test.cpp", tmp_path / "vec_math_test"
    options = ["-std=c++20", "-O2", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    options += [f"-DLLMENGINE_ISA={isa}", *flags_of(isa)]
    subprocess.run([COMPILER, *options, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("passed") == 8
