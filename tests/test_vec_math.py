"""The accuracy that csrc/cpu/vec_math.h states, on every instruction set of the machine: a compiled sweep of floats."""

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
