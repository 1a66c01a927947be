"""How the build finds NVIDIA's compiler: its wheels are asked for, make one toolkit, and are named where they lack."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import build_backend
from build_backend import TOOLKIT, WHEELS
from llmengine.testing import resources

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that is looked into, and no other; no wheel is there."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), str(tmp_path / "site")])
    monkeypatch.setenv("LLMENGINE_CUDA", "wheels")
    return tmp_path / "site"


def lay(site: Path, *wheels: str) -> None:
    for wheel in wheels:
        part = site / TOOLKIT / WHEELS[wheel]
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()


def test_the_compiler_of_the_wheels(site):
    lay(site, *WHEELS)
    assert build_backend.nvcc() == site / TOOLKIT / "bin/nvcc"


@pytest.mark.parametrize("absent", [*([name] for name in WHEELS), list(WHEELS)], ids=" ".join)
def test_a_wheel_that_lacks_is_named_with_the_way_to_get_it(site, absent):
    lay(site, *(WHEELS.keys() - absent))
    command = "pip install " + " ".join(f"'{name}==13.*'" for name in absent)
    with pytest.raises(SystemExit, match=f"no {', '.join(absent)} .*{re.escape(command)}$"):
        build_backend.nvcc()


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_only_who_asks_for_the_wheels_gets_them(monkeypatch, hook):
    monkeypatch.setattr(build_backend.build_meta, hook, lambda settings: ["ninja"])
    for asked in ("auto", "1", "0", None):
        monkeypatch.delenv("LLMENGINE_CUDA", raising=False)
        if asked:
            monkeypatch.setenv("LLMENGINE_CUDA", asked)
        assert getattr(build_backend, hook)() == ["ninja"]
    monkeypatch.setenv("LLMENGINE_CUDA", "Wheels")
    assert getattr(build_backend, hook)() == ["ninja", *(f"{name}==13.*" for name in WHEELS)]


# ---- CMakeLists.txt --------------------------------------------------------------------------------------------------


def test_cmake_builds_what_the_budget_reports_and_code_for_what_comes_after():
    text = (ROOT / "CMakeLists.txt").read_text()
    made = [
        (virtual, code)
        for virtual, codes in re.findall(r"--generate-code=arch=compute_(\w+),code=\[([^]]*)\]", text)
        for code in codes.split(",")
    ]
    real = {code.removeprefix("sm_"): virtual for virtual, code in made if code.startswith("sm_")}
    assert real == {a: resources.virtual(Path("norm.cu"), a) for a in resources.ARCHITECTURES}
    (ptx,) = (code.removeprefix("compute_") for _, code in made if code.startswith("compute_"))
    assert ptx.isdecimal() and int(ptx) == max(int(re.sub(r"\D", "", a)) for a in real), "which later GPUs compile"
    (hopper,) = re.findall(r"set_target_properties\(cuda_hopper PROPERTIES CUDA_ARCHITECTURES (\S+)-real\)", text)
    assert hopper in real and resources.virtual(Path("gemm_sm90a.cu"), hopper) == hopper


# ---- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_what_cmake_is_told(site, script, monkeypatch):
    lay(site, *WHEELS)
    assert script["cuda_wanted"]() == ("ON", site / TOOLKIT / "bin/nvcc")
    for given, word in (("auto", "AUTO"), ("1", "ON"), ("0", "OFF")):
        monkeypatch.setenv("LLMENGINE_CUDA", given)
        assert script["cuda_wanted"]() == (word, None)
    monkeypatch.setenv("LLMENGINE_CUDA", "yes")
    with pytest.raises(SystemExit, match="LLMENGINE_CUDA=yes is not one of auto, 1, wheels, 0"):
        script["cuda_wanted"]()


@pytest.mark.parametrize(
    "line, asked, kept",
    [
        ("CMAKE_CUDA_COMPILER:FILEPATH={here}", None, True),
        ("CMAKE_CUDA_COMPILER:FILEPATH={here}", "here", True),
        ("CMAKE_CUDA_COMPILER:FILEPATH={here}", "another", False),
        ("CMAKE_CUDA_COMPILER:FILEPATH={gone}", None, False),
        ("CMAKE_CUDA_COMPILER:FILEPATH=NOTFOUND", "here", True),
        ("CMAKE_MAKE_PROGRAM:FILEPATH={gone}", None, False),
        ("CMAKE_CXX_COMPILER:FILEPATH={gone}", "here", True),
    ],
)
def test_a_build_folder_is_kept_while_its_tools_are(script, tmp_path, line, asked, kept):
    here, build = tmp_path / "here", tmp_path / "build"
    here.touch()
    build.mkdir()
    (build / "CMakeCache.txt").write_text("# a comment\n" + line.format(here=here, gone=tmp_path / "gone") + "\n")
    script["forget_other_tools"](build, asked and tmp_path / asked)
    assert build.exists() == kept
