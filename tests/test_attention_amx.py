"""Attention's AMX kernels on any machine, in emulation; tests/test_native.py runs the operators' laws over them."""

from __future__ import annotations

from pathlib import Path

from programs import compiled, printed_by

from llmengine import _cpu


def test_random_calls_are_within_their_roundings(tmp_path: Path):
    names = ("kernels/attention_forward", "kernels/attention_backward", "parallel", "isa")
    sources = ["tests/csrc/attention_amx_test.cpp", *(f"csrc/cpu/{name}.cpp" for name in names)]
    flags = ["-DLLMENGINE_X86_KERNELS", "-DLLMENGINE_ISA=amx", "-DLLMENGINE_AMX_EMULATED", "-Wno-psabi", "-fopenmp"]
    flags += ["-mfma"] if "avx2" in _cpu.supported_isas() else []  # the emulation calls a function for each otherwise
    assert printed_by(compiled(sources, tmp_path / "attention_amx_test", flags)) == "passed 60 cases\n"
