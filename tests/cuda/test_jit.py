"""Kernels that are compiled at first use: every one of the long tail compiles and spills nothing, its name is the one
that the host's side asks for, and the laws of the folder that machine code is kept in. Nothing here runs on a GPU."""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llmengine
from llmengine import functional
from llmengine.backends.cuda import jit, nvrtc
from llmengine.backends.cuda.native import BUILT_AHEAD, JIT, Native, exact_kernels
from llmengine.ops import registry
from llmengine.testing import resources, simulator

ROOT = Path(__file__).resolve().parents[2]
TAIL = [dim for dim in range(32, 257, 16) if dim not in BUILT_AHEAD]
SPACE = "llmengine::cuda::attention::"


def compiler_of_nvidia() -> nvrtc.Nvrtc | None:
    try:
        return nvrtc.load()
    except nvrtc.NvrtcError:
        return None


NEEDS_NVRTC = pytest.mark.skipif(compiler_of_nvidia() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
NEEDS_CUOBJDUMP = pytest.mark.skipif(resources.cuobjdump() is None, reason="needs cuobjdump: CUDA's or Triton's")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """The text that lies in the module `_cuda`, as CMake writes it."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake is not None
    written = tmp_path_factory.mktemp("embedded") / "kernel_sources.cpp"
    script = ["-P", ROOT / "csrc/cuda/embed.cmake"]
    subprocess.run([cmake, f"-DSOURCES={ROOT / 'csrc'}", f"-DOUTPUT={written}", *script], check=True)
    found = dict(re.findall(r'^\{"([^"]+)", R"source\((.*?)\)source"\},$', written.read_text(), flags=re.M | re.S))
    assert all(text == (ROOT / "csrc" / name).read_text() for name, text in found.items())
    return found


# ---- kernels ---------------------------------------------------------------------------------------------------------


def instances(dim: int, dtype: str) -> dict[str, list[str]]:
    """The kernels of a class of head dims, by their files."""
    plain, of = ("true", "false"), f"llmengine::{dtype}, {dim}"
    wanted = (3,) if dim <= 144 else (1, 2)
    return {
        "forward": [f"{SPACE}attention_forward_sm80<{of}, {p}>" for p in plain],
        "rows": [f"{SPACE}attention_rows_sm80<{of}, {p}>" for p in plain],
        "keys": [f"{SPACE}attention_keys_sm80<{of}, {p}, {w}>" for p in plain for w in wanted],
        "bias": [f"{SPACE}attention_{what}_sm80<{of}>" for what in ("mask", "distances")],
    }


def products_of_a_tile(forward: str) -> int:
    """What a forward kernel multiplies against a tile of keys, in products of 16 x 8 x 16: none for columns that the
    head does not have."""
    dim, plain = (word.strip(" >") for word in forward.split(",")[1:])
    columns, blocks = int(dim), 2 if int(dim) <= 128 else 1
    keys = 48 if 64 < columns <= 128 or columns == 240 else 64
    keys = keys if plain == "true" or columns <= 64 else 32
    return 2 * blocks * (keys // 8) * (columns // 16)


def quick(dim: int, capability: int, dtype: str) -> bool:
    return (dim, capability, dtype) in {(80, 90, "bf16"), (192, 80, "f16")}


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
@pytest.mark.parametrize(
    "dim, capability, dtype",
    [
        pytest.param(*case, marks=[] if quick(*case) else [pytest.mark.heavy])
        for case in itertools.product(TAIL, (80, 90, 100), ("bf16", "f16"))
    ],
)
@pytest.mark.timeout(1200)
def test_every_kernel_of_the_long_tail_compiles_and_spills_nothing(
    dim: int, capability: int, dtype: str, sources: dict[str, str], tmp_path: Path
):
    for part, kernels in instances(dim, dtype).items():
        source = f"cuda/attention_sm80_{part}.cu"
        files = jit.closure(sources, source)
        names, image = nvrtc.load().compile(files, source, kernels, f"sm_{capability}")
        cubin = tmp_path / f"{part}.cubin"
        cubin.write_bytes(image)
        taken = resources.usage_of_cubin(cubin)
        assert taken.keys() == set(names.values())
        for kernel in kernels:
            assert taken[names[kernel]]["stack"] == taken[names[kernel]]["local"] == 0, (kernel, taken[names[kernel]])
        if part == "forward":
            products = resources.instructions_of_cubin(cubin, r"\bHMMA\.16816\.F32")
            assert {k: products[names[k]] for k in kernels} == {k: products_of_a_tile(k) for k in kernels}


def test_what_the_host_asks_for_is_what_is_tried_here():
    """Of a class of head dims that the simulator is not built with, the compiler is asked; the wider class serves."""
    asked = []
    simulator.prepare("asked")
    module = importlib.import_module("llmengine._cuda_sim")
    module.set_compiler(lambda *instance: asked.append(instance))
    try:
        for dim in (80, 96, 160):  # 96 the simulator has
            q, k, v = (torch.randn(1, 1, 5, dim).bfloat16().requires_grad_() for _ in range(3))
            mask, table = torch.randn(5, 5, requires_grad=True), torch.randn(1, 3, requires_grad=True)
            for options in ({}, {"attn_mask": mask, "distance_bias": table}):
                found = []
                for exact in (True, False):
                    with llmengine.backend("cuda_sim"), exact_kernels(exact):
                        y = functional.scaled_dot_product_attention(q, k, v, **options)
                        found.append([y, *torch.autograd.grad(y.sum(), [q, k, v, *options.values()])])
                assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        module.set_compiler(lambda *instance: None)
    tried = {
        (f"cuda/attention_sm80_{part}.cu", kernel, 90)
        for dim in (80, 160)
        for part, kernels in instances(dim, "bf16").items()
        for kernel in kernels
    }
    assert set(asked) == {t for t in tried if "160" not in t[1] or "keys" not in t[1] or t[1].endswith("1>")}


def test_a_value_that_asks_for_nothing_is_refused(monkeypatch):
    simulator.prepare("value")
    monkeypatch.setenv(JIT, "yes")
    q = torch.randn(1, 1, 5, 32).bfloat16()
    with llmengine.backend("cuda_sim"), pytest.raises(ValueError, match="LLMENGINE_CUDA_JIT: 'yes' is not one of 0, 1"):
        functional.scaled_dot_product_attention(q, q, q)


def test_what_a_call_that_failed_launched_is_not_told_of_the_next(monkeypatch):
    launched: list[str] = []

    def launch(instance: str, fails: bool, stream: int) -> None:
        launched.append(instance)
        if fails:
            raise RuntimeError("out of memory")

    def take() -> list[str]:
        taken = launched.copy()
        launched.clear()
        return taken

    told: list[str] = []
    monkeypatch.setattr(registry, "tell", told.append)
    native = Native("module", "cuda_sim", "cpu", "")
    native.module = SimpleNamespace(launch=launch, take_launched=take, take_left=list)
    with pytest.raises(RuntimeError, match="out of memory"):
        native.call("launch", torch.ones(1), instance="f<80>", fails=True)
    native.call("launch", torch.ones(1), instance="f<96>", fails=False)
    native.tell_launched()
    assert told == ["compiled at first use: f<96>"]


@NEEDS_NVRTC
def test_an_error_in_a_source_says_where():
    sources = {"a.cu": "template <int n>\n__global__ void f(int* x) { *x = y; }"}
    with pytest.raises(nvrtc.NvrtcError, match=r'a\.cu\(2\): error: identifier "y" is undefined'):
        nvrtc.load().compile(sources, "a.cu", ["f<1>"], "sm_80")


# ---- the disk --------------------------------------------------------------------------------------------------------

SOURCES = {"k.cu": '#include "k.h"\nkernel', "k.h": "struct", "other.h": "not included"}


class Fake:
    """In NVRTC's place: code is a number of its own."""

    def __init__(self, version: str = "13.0"):
        self.version, self.compiled, self.wait = version, 0, 0.0

    def architectures(self) -> list[int]:
        return [80, 90]

    def compile(self, sources, source, kernels, architecture):
        time.sleep(self.wait)
        self.compiled += 1
        return {kernels[0]: f"_Z{self.compiled}"}, f"code\n{self.compiled} {architecture}".encode() * 100


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv(jit.CACHE, str(tmp_path / "kernels"))
    monkeypatch.setattr(warnings, "filters", [("ignore", None, jit.CompiledKernelWarning, None, 0)])
    return tmp_path / "kernels"


def ask(fake, sources=SOURCES, kernel: str = "f<1>", capability: int = 90):
    """As a process does that has asked for nothing yet."""
    return jit.Compiler(sources, lambda: fake)("k.cu", kernel, capability)


def test_code_is_compiled_once_and_then_read(folder: Path):
    fake = Fake()
    first = ask(fake)
    assert first == ("_Z1", b"code\n1 sm_90" * 100)
    assert ask(fake) == first and fake.compiled == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [p.suffix for p in folder.iterdir()] == [".cubin"], "nothing else is left there"


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "f<2>"},
        {"capability": 80},
        {"sources": SOURCES | {"k.h": "struct changed"}},
        {"fake": Fake("13.1")},
        {"options": ("-G",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_code_depends_on_is_in_its_key(change: dict, folder: Path, monkeypatch):
    first, fake = Fake(), change.pop("fake", Fake())
    ask(first)
    if "options" in change:
        monkeypatch.setattr(nvrtc, "OPTIONS", change.pop("options"))
    ask(fake, **change)
    assert fake.compiled == 1 and len(list(folder.iterdir())) == 2


def test_a_file_that_is_not_included_changes_nothing(folder: Path):
    fake = Fake()
    ask(fake)
    ask(fake, SOURCES | {"other.h": "changed"})
    assert fake.compiled == 1


CORRUPTIONS = {
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "a bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "no record": lambda data: data.partition(b"\n")[2],
    "another kernel's": lambda data: data.replace(b"f<1>", b"f<2>"),
    "another record": lambda data: b'{"name": "_Z1"}\n' + data.partition(b"\n")[2],
    "not an object": lambda data: b"[1]\n" + data.partition(b"\n")[2],
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_file_that_does_not_hold_is_made_anew(name: str, folder: Path):
    fake = Fake()
    ask(fake)
    (path,) = folder.iterdir()
    path.write_bytes(CORRUPTIONS[name](path.read_bytes()))
    second = ask(fake)
    assert fake.compiled == 2 and second.name == "_Z2"
    assert ask(fake) == second and fake.compiled == 2


def test_a_folder_that_others_may_write_is_not_read(folder: Path):
    fake = Fake()
    ask(fake)
    folder.chmod(0o777)
    with pytest.warns(jit.CompiledKernelWarning, match="others may write there.*not kept"):
        assert ask(fake).name == "_Z2"


def test_without_a_folder_code_is_this_process_s(tmp_path: Path, monkeypatch):
    fake, file = Fake(), tmp_path / "file"
    file.touch()
    monkeypatch.setenv(jit.CACHE, str(file / "kernels"))
    compiler = jit.Compiler(SOURCES, lambda: fake)
    with pytest.warns(jit.CompiledKernelWarning, match="not kept"):
        first = compiler("k.cu", "f<1>", 90)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert compiler("k.cu", "f<1>", 90) == first and fake.compiled == 1
        monkeypatch.setenv(jit.CACHE, "")
        assert compiler("k.cu", "f<2>", 90).name == "_Z2"
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_home_code_is_this_process_s(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for variable in (jit.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(jit.CompiledKernelWarning, match="Could not determine home directory.; compiled kernels are not"):
        assert ask(Fake()).name == "_Z1"


def test_a_folder_that_is_read_alone_is_read(folder: Path, monkeypatch):
    def refused(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    fake = Fake()
    first = ask(fake)
    monkeypatch.setattr(os, "utime", refused)
    assert ask(fake) == first and fake.compiled == 1


def test_what_a_process_that_was_ended_left_is_deleted_when_nobody_writes_it_any_more(folder: Path):
    folder.mkdir(mode=0o700)
    old, new = (folder / f".{key}.cubin.123" for key in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 2 * jit.BROKEN_OFF,) * 2)
    ask(Fake())
    assert not old.exists() and new.exists()


def test_what_lies_in_the_working_folder_is_loaded_beside_no_library(tmp_path: Path, monkeypatch):
    beside = tmp_path / "libnvrtc-builtins.so.13.0"
    beside.touch()
    monkeypatch.chdir(tmp_path)
    assert nvrtc.builtins_beside(tmp_path / "libnvrtc.so.13") == [beside]
    assert nvrtc.builtins_beside(Path("libnvrtc.so.13")) == []


def test_the_longest_unused_is_deleted(folder: Path, monkeypatch):
    fake = Fake()
    for n in range(4):
        ask(fake, kernel=f"f<{n}>")
        if n == 2:
            time.sleep(0.02)
            ask(fake, kernel="f<0>")  # used again
            size = sum(path.stat().st_size for path in folder.iterdir())
            monkeypatch.setattr(jit, "LIMIT", size)
        time.sleep(0.02)
    left = {json.loads(path.read_bytes().partition(b"\n")[0])["kernel"] for path in folder.iterdir()}
    assert left == {"f<0>", "f<2>", "f<3>"}


def test_the_first_compilation_is_told_and_later_ones_are_not(folder: Path):
    compiler = jit.Compiler(SOURCES, Fake)
    with pytest.warns(jit.CompiledKernelWarning, match=r"compiled f<1> for sm_90 in 0\.0 s"):
        compiler("k.cu", "f<1>", 90)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler("k.cu", "f<2>", 90)


def test_what_cannot_be_compiled_is_said_and_not_had(folder: Path):
    def missing():
        raise nvrtc.NvrtcError("libnvrtc was not found")

    with pytest.warns(jit.CompiledKernelWarning, match="libnvrtc was not found; kernels built ahead serve"):
        assert jit.Compiler(SOURCES, missing)("k.cu", "f<1>", 90) is None
    with pytest.warns(jit.CompiledKernelWarning, match="knows no sm_75"):
        assert ask(Fake(), capability=75) is None
    assert not folder.exists()


def test_threads_compile_a_kernel_once(folder: Path):
    fake = Fake()
    fake.wait = 0.05
    compiler, found = jit.Compiler(SOURCES, lambda: fake), []
    threads = [threading.Thread(target=lambda: found.append(compiler("k.cu", "f<1>", 90))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.compiled == 1 and len(found) == 8 and len(set(found)) == 1


ONE_OF_MANY = """
import sys
from tests.cuda.test_jit import Fake, SOURCES, jit
class Own(Fake):
    def compile(self, sources, source, kernels, architecture):
        self.compiled += 1
        return {kernels[0]: "_Z" + sys.argv[1]}, sys.argv[1].encode() * 200_000
for turn in range(40):
    name, image = jit.Compiler(SOURCES, Own)("k.cu", f"f<{turn % 5}>", 90)
    assert image == name[2:].encode() * 200_000, name
    for path in jit.folder().glob("*.cubin") if turn % 7 == int(sys.argv[1]) else ():
        path.unlink(missing_ok=True)
"""


def test_processes_read_whole_files_or_none(folder: Path):
    """Four that compile, read and delete the same kernels: a name never comes with another's code."""
    run = [sys.executable, "-W", "ignore", "-c", ONE_OF_MANY]
    processes = [subprocess.Popen([*run, str(n)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for n in range(4)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert {path.suffix for path in folder.iterdir()} <= {".cubin"}
