"""Products of pairs of bf16 (csrc/cpu/pair_tile.h) on every instruction set of the machine, and AMX's in emulation."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import compiled, flags_of, printed_by

from llmengine import _cpu

EMULATED = "amx in emulation"


@pytest.mark.parametrize("isa", [*_cpu.supported_isas(), EMULATED])
def test_products_of_pairs(isa: str, tmp_path: Path):
    if isa == EMULATED:
        flags = ["-DLLMENGINE_ISA=amx", "-DLLMENGINE_AMX_EMULATED", "-Wno-psabi"]
    else:
        flags = [f"-DLLMENGINE_ISA={isa}", *flags_of(isa)]
    program = compiled(["tests/csrc/pair_tile_test.cpp"], tmp_path / "pair_tile_test", flags)
    assert printed_by(program).startswith("passed")


def test_amx_kernels_compile_and_multiply_tiles(tmp_path: Path):
    """Whether or not this machine has them."""
    flags = ["-DLLMENGINE_ISA=amx", *flags_of("amx"), "-S"]
    assembly = compiled(["tests/csrc/pair_tile_test.cpp"], tmp_path / "pair_tile_test.s", flags).read_text()
    assert assembly.count("tdpbf16ps") >= 9 and assembly.count("ldtilecfg") >= 1
