"""Attention's AMX kernels on any machine, in emulation; tests/test_native.py runs the operators' laws over them."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import compiled, flags_of, printed_by

from llmengine import _cpu


@pytest.mark.timeout(1800)  # with sanitizers the kernels take minutes to compile
def test_random_calls_are_within_their_roundings(tmp_path: Path):
    names = ("kernels/attention_forward", "kernels/attention_backward", "parallel", "isa")
    sources = ["tests/csrc/attention_amx_test.cpp", *(f"csrc/cpu/{name}.cpp" for name in names)]
    flags = ["-DLLMENGINE_X86_KERNELS", "-DLLMENGINE_ISA=amx", "-DLLMENGINE_AMX_EMULATED", "-Wno-psabi", "-fopenmp"]
    # where the processor has all but the tiles, all but the tiles is as it is with them
    flags += flags_of("avx512_bf16") if "avx512_bf16" in _cpu.supported_isas() else []
    assert (
        printed_by(compiled(sources, tmp_path / "attention_amx_test", [*flags, "-O1"]))
        == "passed 60 cases, 9 of them with NaN\n"
    )
