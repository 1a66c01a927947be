"""Matrix products in C++ on every instruction set of the machine, and AMX's in emulation."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import compiled, flags_of, printed_by

from llmengine import _cpu

EMULATED = "amx in emulation"


def flags_for(isa: str) -> list[str]:
    if isa == EMULATED:
        return ["-DLLMENGINE_X86_KERNELS", "-DLLMENGINE_ISA=amx", "-DLLMENGINE_AMX_EMULATED", "-Wno-psabi"]
    return ["-DLLMENGINE_X86_KERNELS", f"-DLLMENGINE_ISA={isa}", *flags_of(isa)]


every_isa = pytest.mark.parametrize("isa", [*_cpu.supported_isas(), EMULATED])


@every_isa
def test_products_of_pairs(isa: str, tmp_path: Path):
    program = compiled(
        ["tests/csrc/pair_tile_test.cpp", "csrc/cpu/isa.cpp"], tmp_path / "pair_tile_test", flags_for(isa)
    )
    assert printed_by(program).startswith("passed")


@every_isa
def test_products_of_every_kind(isa: str, tmp_path: Path):
    sources = ["tests/csrc/gemm_test.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("kernels/gemm", "parallel", "isa"))]
    assert printed_by(compiled(sources, tmp_path / "gemm_test", flags_for(isa))) == "passed 193 cases\n"


def test_amx_kernels_compile_and_multiply_tiles(tmp_path: Path):
    """Whether or not this machine has them."""
    flags = ["-DLLMENGINE_ISA=amx", *flags_of("amx"), "-S"]
    assembly = compiled(["tests/csrc/pair_tile_test.cpp"], tmp_path / "pair_tile_test.s", flags).read_text()
    assert assembly.count("tdpbf16ps") >= 9 and assembly.count("ldtilecfg") >= 1
