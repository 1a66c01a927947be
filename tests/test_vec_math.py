"""The accuracy that csrc/cpu/vec_math.h states, on every instruction set of the machine, and that of AMX's exponentials
on any machine: compiled sweeps of floats."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import compiled, flags_of, printed_by

from llmengine import _cpu


@pytest.mark.parametrize("isa", _cpu.supported_isas())
def test_vector_functions_are_as_accurate_as_they_say(isa: str, tmp_path: Path):
    flags = [f"-DLLMENGINE_ISA={isa}", *flags_of(isa)]
    program = compiled(["tests/csrc/vec_math_test.cpp"], tmp_path / "vec_math_test", flags)
    assert printed_by(program).count("passed") == 11


def test_exponentials_of_amx_are_as_accurate_as_they_say(tmp_path: Path):
    flags = ["-DLLMENGINE_ISA=amx", "-DLLMENGINE_AMX_EMULATED", "-Wno-psabi"]
    flags += flags_of("avx512_bf16") if "avx512_bf16" in _cpu.supported_isas() else []
    program = compiled(["tests/csrc/amx_math_test.cpp"], tmp_path / "amx_math_test", flags)
    assert printed_by(program).count("passed") == 2
