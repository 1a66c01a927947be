"""The native CPU module built in other ways, all of it heavy: AMX's tiles emulated; sanitizers (`make sanitize`)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import OWN, ROOT, SUITE, laws, printed, run, run_tests
from programs import COMPILER

import llmengine
from llmengine import _cpu

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2 * 3600)]
X86 = platform.machine() in ("x86_64", "AMD64")


def build(directory: Path, *options: str) -> None:
    """A copy of the package in `directory`, its module built with these options of CMakeLists.txt."""
    import pybind11

    package, objects = directory / "llmengine", directory / "build"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(Path(llmengine.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(objects), f"-DCMAKE_INSTALL_PREFIX={package}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DLLMENGINE_CUDA=OFF", *options,
    ]  # fmt: skip
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    for command in (configure, ["cmake", "--build", str(objects), "--parallel", jobs, "--target", "install"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.skipif(not X86, reason="AMX belongs to x86")
def test_the_operator_suite_on_emulated_tiles(tmp_path: Path):
    """AMX's kernels on any machine: its tiles are emulated, all else is theirs."""
    build(tmp_path, "-DLLMENGINE_AMX_EMULATED=ON")
    environment = {"LLMENGINE_CPU_ISA": "amx"}
    assert printed("from llmengine import _cpu; print(_cpu.isa())", 120, tmp_path, **environment) == "amx"
    for file in SUITE:
        run_tests(file, OWN, 3500, tmp_path, **environment)


# ---- sanitizers ------------------------------------------------------------------------------------------------------

SANITIZED = ROOT / "build" / "sanitize"  # stays, so that a second run compiles what has changed


def preloaded() -> str:
    """The sanitizers' libraries, which Python itself was not linked with."""
    paths = []
    for library in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [COMPILER, f"-print-file-name={library}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert all(map(os.path.isabs, paths)), f"needs GCC and its sanitizers (CXX=g++), and {COMPILER} has none: {paths}"
    return ":".join(paths)


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment of processes that run the module which this builds in SANITIZED."""
    if sys.platform != "linux":
        pytest.skip("preloads the sanitizers' libraries by their Linux names")
    build(SANITIZED, "-DLLMENGINE_SANITIZE=address,undefined", f"-DLLMENGINE_AMX_EMULATED={'ON' if X86 else 'OFF'}")
    environment = {
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    file = printed("from llmengine import _cpu; print(_cpu.__file__)", 120, SANITIZED, **environment)
    assert file.startswith(str(SANITIZED))
    return environment


# A tensor that claims more elements than its memory has.
OVERRUN = """
import torch
from llmengine import _cpu

class Liar:
    def __init__(self, tensor, shape):
        self.shape, self.dtype, self.device, self.data_ptr = shape, tensor.dtype, tensor.device, tensor.data_ptr
        self.stride = lambda: (shape[1], 1)

_cpu.softmax_forward(input=Liar(torch.ones(100), (1, 104)), output=torch.empty(1, 104))
"""


every_isa = pytest.mark.parametrize("isa", list(dict.fromkeys([*_cpu.supported_isas(), *["amx"] * X86])))


@every_isa
def test_sanitizers_are_awake(isa: str, sanitized):
    """Were they asleep, this would pass, and so would everything below."""
    overrun = run(["-c", OVERRUN], 120, SANITIZED, LLMENGINE_CPU_ISA=isa, **sanitized)
    assert overrun.returncode != 0 and "ERROR: AddressSanitizer" in overrun.stderr, overrun.stderr[-4000:]


@every_isa
def test_laws_under_sanitizers(isa: str, sanitized):
    selected = laws("test_errors_against_float64", "test_every_layout", "test_repeats")
    run_tests("test_ops.py", selected, 3600, SANITIZED, LLMENGINE_CPU_ISA=isa, **sanitized)


@every_isa
def test_attention_under_sanitizers(isa: str, sanitized):
    run_tests("test_attention.py", f"{OWN} and not memory", 3600, SANITIZED, LLMENGINE_CPU_ISA=isa, **sanitized)


def test_fuzz_under_sanitizers(sanitized):
    run_tests("test_native.py", "test_no_argument_crashes", 3600, SANITIZED, **sanitized)
