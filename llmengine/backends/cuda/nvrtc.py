"""NVRTC, NVIDIA's compiler as a library: CUDA C++ to machine code, here and now, for any GPU. It needs no GPU, no
toolkit and no header: what kernels include of the standard library and of CUDA is written below.

PyTorch's builds for CUDA bring it; otherwise `pip install nvidia-cuda-nvrtc`, or the CUDA toolkit. It is loaded when
first asked for, and absent is an ordinary state.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

import torch

MAJORS = ("13", "12")  # of CUDA
# Functions that say nothing are the device's, since the host's are not there; no word on members that no kernel uses.
OPTIONS = ("-std=c++20", "-default-device", "-diag-suppress=177")
STAND_INS = {
    "cuda_runtime.h": "",  # NVRTC knows CUDA's language by itself
    "cmath": "#pragma once\n#define INFINITY __builtin_bit_cast(float, 0x7f800000)\n",
    "cstdint": """#pragma once
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
""",
}


class NvrtcError(RuntimeError):
    """It is not there, knows no such GPU, or does not take the source."""


class Nvrtc:
    def __init__(self, library: ctypes.CDLL, path: str):
        self.library, self.path = library, path
        library.nvrtcGetErrorString.restype = c_char_p
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def architectures(self) -> list[int]:
        """Compute capabilities that it makes machine code for: 80 is 8.0."""
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        found = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(
        self, sources: Mapping[str, str], source: str, kernels: list[str], architecture: str
    ) -> tuple[dict[str, str], bytes]:
        """Machine code of instantiations of kernel templates ("space::kernel<int, 3>") of one of the sources, and the
        names that they have in it. Files include one another by the names in `sources`."""
        headers = {**STAND_INS, **sources}
        texts, names = (
            (c_char_p * len(headers))(*(text.encode() for text in of)) for of in (headers.values(), headers)
        )
        program = c_void_p()
        self._call(
            "nvrtcCreateProgram", byref(program), sources[source].encode(), source.encode(), len(headers), texts, names
        )
        try:
            for kernel in kernels:
                self._call("nvrtcAddNameExpression", program, kernel.encode())
            options = [*OPTIONS, f"-arch={architecture}"]
            given = (c_char_p * len(options))(*(option.encode() for option in options))
            if status := self.library.nvrtcCompileProgram(program, len(options), given):
                raise NvrtcError(f"NVRTC {self.version}: {source}: {self._text(status)}\n{self._log(program)}")
            lowered = {}
            for kernel in kernels:
                name = c_char_p()
                self._call("nvrtcGetLoweredName", program, kernel.encode(), byref(name))
                lowered[kernel] = (name.value or b"").decode()
            return lowered, self._bytes("nvrtcGetCUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", byref(program))

    def _log(self, program: c_void_p) -> str:
        return self._bytes("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")

    def _bytes(self, function: str, program: c_void_p) -> bytes:
        size = c_size_t()
        self._call(f"{function}Size", program, byref(size))
        found = ctypes.create_string_buffer(size.value)
        self._call(function, program, found)
        return found.raw

    def _call(self, function: str, *arguments) -> None:
        if status := getattr(self.library, function)(*arguments):
            raise NvrtcError(f"NVRTC: {function}: {self._text(status)}")

    def _text(self, status: int) -> str:
        return (self.library.nvrtcGetErrorString(status) or b"").decode()


# ---- where it lies ---------------------------------------------------------------------------------------------------


@functools.cache
def load() -> Nvrtc:
    """Raises NvrtcError where there is none."""
    tried = []
    for path in candidates():
        try:
            for beside in builtins_beside(Path(path)):
                ctypes.CDLL(str(beside))
            return Nvrtc(ctypes.CDLL(path), path)
        except OSError as error:
            tried.append(f"{path} ({error})")
    raise NvrtcError(f"libnvrtc was not found: pip install nvidia-cuda-nvrtc; tried {', '.join(tried)}")


def builtins_beside(library: Path) -> list[Path]:
    """What NVRTC looks for by name alone; of a library that the loader finds by its name, the loader finds it, too."""
    return sorted(library.parent.glob("libnvrtc-builtins.so.*")) if library.is_absolute() else []


def candidates() -> Iterator[str]:
    """The wheels', a toolkit's, then wherever the loader looks; of the CUDA that PyTorch was built for first, since the
    driver runs that one's code."""
    folders = [Path(folder) / "nvidia" for folder in sys.path]
    majors = sorted(MAJORS, key=lambda major: not (torch.version.cuda or "").startswith(major))
    for major in majors:
        name = f"libnvrtc.so.{major}"
        places = [folder / wheel / "lib" / name for folder in folders for wheel in (f"cu{major}", "cuda_nvrtc")]
        places += [Path(home) / "lib64" / name for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
        yield from (str(place) for place in places if place.is_file())
    yield from (f"libnvrtc.so.{major}" for major in majors)
