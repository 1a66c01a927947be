"""Kernels that are compiled when they are first used: by NVRTC (nvrtc.py), for csrc/cuda/compiled.h, which asks here.

Machine code is kept in $XDG_CACHE_HOME/llmengine/kernels, or $LLMENGINE_CUDA_CACHE (empty: it is not kept), one file a
kernel, named by a digest of all that the code depends on: sources, options, NVRTC's version, architecture, kernel.

    {"kernel": "...<llmengine::bf16, 96, true>", "name": "_ZN...", "sha256": "..."}\\n   and the code

Files are written under another name and renamed, so that processes may write and read at once; what a file says is
checked, and one that does not hold is made anew. What was used longest ago is deleted above LIMIT bytes. The folder is
its user's own: nothing is read from one that others may write. No folder is no error: a warning, and code that this
process alone has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from llmengine.backends.cuda import nvrtc
from llmengine.files import cache_folder, replace_bytes

CACHE = "LLMENGINE_CUDA_CACHE"
FORMAT = 1
LIMIT = 64 << 20
BROKEN_OFF = 3600.0  # seconds after which nobody is still writing a file


class CompiledKernelWarning(UserWarning):
    """The first kernel is compiled, one could not be, or its code could not be kept."""


class Code(NamedTuple):
    name: str  # the kernel's, in the image
    image: bytes


# ---- the disk --------------------------------------------------------------------------------------------------------


class Cache:
    def __init__(self, folder: Path):
        """Raises OSError where there is no folder that is this user's own."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{folder} is another user's, or others may write there; machine code is run from it")

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.cubin"

    def read(self, key: str, kernel: str) -> Code | None:
        """None where there is none that holds."""
        path = self.path(key)
        try:
            line, _, image = path.read_bytes().partition(b"\n")
            record = json.loads(line)
            if record != {"kernel": kernel, "name": record["name"], "sha256": hashlib.sha256(image).hexdigest()}:
                return None
            code = Code(record["name"], image)
        except (OSError, ValueError, LookupError, TypeError):
            return None
        with contextlib.suppress(OSError):  # a file system that is read alone
            os.utime(path)
        return code

    def write(self, key: str, kernel: str, code: Code) -> None:
        record = {"kernel": kernel, "name": code.name, "sha256": hashlib.sha256(code.image).hexdigest()}
        replace_bytes(self.path(key), json.dumps(record).encode() + b"\n" + code.image)
        self._prune()

    def _prune(self) -> None:
        self._forget_broken_off()
        files = []
        for path in self.folder.glob("*.cubin"):
            try:
                files.append((path.stat(), path))
            except FileNotFoundError:  # another process has pruned it
                continue
        total = sum(found.st_size for found, _ in files)
        for found, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total <= LIMIT:
                break
            path.unlink(missing_ok=True)
            total -= found.st_size

    def _forget_broken_off(self) -> None:
        """What processes that were ended while they wrote have left under other names (llmengine.files)."""
        for path in self.folder.glob(".*.cubin.*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - BROKEN_OFF:
                    path.unlink()


def folder() -> Path | None:
    """Raises RuntimeError where there is no home."""
    given = os.environ.get(CACHE)
    if given is not None:
        return Path(given) if given else None
    return cache_folder() / "kernels"


# ---- the compiler ----------------------------------------------------------------------------------------------------


class Compiler:
    """What csrc/cuda/compiled.h calls a compiler, of these sources; from several threads at once, too."""

    def __init__(self, sources: Mapping[str, str], load: Callable[[], nvrtc.Nvrtc] = nvrtc.load):
        self.sources, self.load = sources, load
        self._lock = threading.Lock()
        self._made: dict[tuple[str, int], Code] = {}
        self._told: set[str] = set()

    def __call__(self, source: str, kernel: str, capability: int) -> Code | None:
        with self._lock:
            try:
                if (kernel, capability) not in self._made:
                    self._made[kernel, capability] = self._code(source, kernel, capability)
                return self._made[kernel, capability]
            except nvrtc.NvrtcError as error:
                self._tell(f"{error}; kernels built ahead serve")
                return None

    def _code(self, source: str, kernel: str, capability: int) -> Code:
        compiler, architecture = self.load(), f"sm_{capability}"
        if capability not in (known := compiler.architectures()):
            raise nvrtc.NvrtcError(f"NVRTC {compiler.version} knows no {architecture}, but {known}")
        files = closure(self.sources, source)
        key, cache = digest(files, kernel, architecture, compiler.version), self._cache()
        if cache and (code := cache.read(key, kernel)):
            return code
        start = time.perf_counter()
        names, image = compiler.compile(files, source, [kernel], architecture)
        seconds, code = time.perf_counter() - start, Code(names[kernel], image)
        if not self._told:
            self._tell(f"compiled {kernel} for {architecture} in {seconds:.1f} s, and others when they are first used")
        if cache:
            try:
                cache.write(key, kernel, code)
            except OSError as error:
                self._tell(f"{error}; compiled kernels are not kept")
        return code

    def _cache(self) -> Cache | None:
        try:
            where = folder()
            return Cache(where) if where else None
        except (OSError, RuntimeError) as error:
            self._tell(f"{error}; compiled kernels are not kept")
            return None

    def _tell(self, text: str) -> None:
        """Once."""
        if text not in self._told:
            self._told.add(text)
            warnings.warn(f"llmengine: {text}", CompiledKernelWarning, stacklevel=2)


def closure(sources: Mapping[str, str], first: str) -> dict[str, str]:
    """The file and those that it includes, straight or by way of others, as far as they are among the sources."""
    found: dict[str, str] = {}
    ahead = [first]
    while ahead:
        name = ahead.pop()
        if name not in found and name in sources:
            found[name] = sources[name]
            ahead += re.findall(r'^\s*#\s*include\s*"([^"]+)"', sources[name], flags=re.M)
    return dict(sorted(found.items()))


def digest(files: Mapping[str, str], kernel: str, architecture: str, version: str) -> str:
    """Of everything that the machine code depends on."""
    parts = [FORMAT, version, nvrtc.OPTIONS, nvrtc.STAND_INS, architecture, kernel, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
