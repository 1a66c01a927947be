"""Checkpoints: folders step-000123 of safetensors and a manifest, which appear whole or not at all.

A checkpoint is written to a hidden folder beside its place: tensors, then the manifest state.json with the size and
SHA-256 of every file, each forced to the disk, then one rename. A process that is killed leaves hidden folders only,
which the next save sweeps away. What a failing disk damages later fails the digest; the checkpoint before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llmengine.convert.files import write_tensors
from llmengine.files import replace_text, sha256, sync

MANIFEST = "state.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_HIDDEN = ".partial-"


class Unreadable(ValueError):
    """A checkpoint that is incomplete or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    facts: dict[str, Any]
    """What `save` was given beside tensors."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One of the groups that `save` was given, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")


def save(directory: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> Path:
    """Writes directory/step-… with one safetensors file per group; a checkpoint of that step that is there is replaced.

    Raises OSError, with errno.ENOSPC where the disk is full; what was there before is then whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    destination = place(directory, step)
    partial = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=directory))
    try:
        files = {}
        for name, tensors in groups.items():
            path = partial / f"{name}.safetensors"
            write_tensors(path, tensors)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = {"format": FORMAT, "step": step, "facts": dict(facts), "files": files}
        manifest["sha256"] = _digest(manifest)
        replace_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        if destination.exists():
            destination.rename(directory / f"{_HIDDEN}replaced-{destination.name}")
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(directory)
    _sweep(directory)
    return destination


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The inverse of `place`."""
    return int(path.name.removeprefix("step-"))


def paths(directory: Path) -> list[Path]:
    """Checkpoints, whole or not, oldest first."""
    found = [p for p in directory.iterdir() if _NAME.fullmatch(p.name)] if directory.is_dir() else []
    return sorted(found, key=step_of)


def read(path: Path) -> Checkpoint:
    """Checks every byte; raises Unreadable saying what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Unreadable(f"{path / MANIFEST} is missing or damaged: {error!r}") from None
    if digest != _digest(manifest):
        raise Unreadable(f"{path / MANIFEST} is damaged: its contents do not have its SHA-256")
    if manifest["format"] != FORMAT:
        raise Unreadable(f"{path} has format {manifest['format']}; this llmengine reads {FORMAT}")
    step = manifest["step"]
    if path != place(path.parent, step):
        raise Unreadable(f"{path / MANIFEST} says step {step}")
    for name, fact in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise Unreadable(f"{file} is missing")
        if file.stat().st_size != fact["bytes"]:
            raise Unreadable(f"{file} has {file.stat().st_size} bytes, not {fact['bytes']}")
        if sha256(file) != fact["sha256"]:
            raise Unreadable(f"{file} is damaged: its SHA-256 is not that of {MANIFEST}")
    return Checkpoint(path, step, manifest["facts"])


def newest(directory: Path, notice: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none at all. Tells `notice` of each damaged one it passes over.

    Raises Unreadable where there are checkpoints and none is whole: starting anew must be the user's decision.
    """
    damages = []
    for path in reversed(paths(directory)):
        try:
            return read(path)
        except Unreadable as error:
            damages.append(str(error))
            notice(f"checkpoint {path.name} is skipped: {error}")
    if damages:
        raise Unreadable(f"no checkpoint in {directory} is whole: {'; '.join(damages)}; start a new run elsewhere")
    return None


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest `keep`; each is hidden first, so that none is ever seen half removed."""
    for path in paths(directory)[:-keep]:
        path.rename(directory / f"{_HIDDEN}old-{path.name}")
    _sweep(directory)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sweep(directory: Path) -> None:
    for path in directory.glob(f"{_HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)
