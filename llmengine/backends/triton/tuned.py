"""Tiles measured on this GPU by `llmengine tune`, in place of those of the built-in tables.

One JSON file a model of GPU, read at its first launch:

    {"format": 2, "device": "...", "architecture": "sm_90", "triton": "...", "llmengine": "...",
     "tiles": {"attention forward plain 128": {"rows": 128, "keys": 64, "warps": 8, "stages": 2,
                                               "built_in": [128, 128, 8, 2], "ms": ..., "built_in_ms": ...}}}

A slot, "attention forward plain 128", is a place in a built-in table. A file that another version wrote, for another
GPU, or that holds what no kernel takes, is left alone: a TunedTableWarning says why, and the built-in tiles are used.
So is a slot whose tile was measured beside another built-in one than there is now.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

import llmengine
from llmengine.backends.triton.device import architecture, device_name
from llmengine.files import cache_folder, read_json, replace_text

VARIABLE = "LLMENGINE_TUNED"  # another file; empty: the built-in tables
FORMAT = 2
FIELDS = {
    "attention": ("rows", "keys", "warps", "stages"),
    "relative": ("rows", "keys", "warps", "stages"),
    "products": ("m", "n", "k", "warps", "stages"),
    "rows": ("height", "warps"),
}
SIZES, WARPS, STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), (1, 2, 3, 4, 5, 6)
HEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BESIDE = ("built_in", "ms", "built_in_ms")
Tile = TypeVar("Tile", bound=Any)  # a NamedTuple whose fields are a line of FIELDS
Tiles = dict[str, dict[str, Any]]


class TunedTableWarning(UserWarning):
    """A file of tuned tiles is not used."""


def tile(slot: str, built_in: Tile, device: torch.device) -> Tile:
    """What the slot holds on that device."""
    if slot in _trials:
        return built_in._replace(**_trials[slot])
    found = _tiles(device).get(slot)
    if found is None:
        return built_in
    beside, fields = found
    if tuple(built_in) != beside:
        _another(slot)
        return built_in
    return built_in._replace(**fields)


@functools.cache
def _another(slot: str) -> None:
    _warn(ValueError(f"tuned tiles: {slot!r} was measured beside another built-in tile than this llmengine's"))


_trials: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def trial(slot: str, candidate: Tile) -> Iterator[None]:
    """Within the block, the slot holds the candidate."""
    _trials[slot] = candidate._asdict()
    try:
        yield
    finally:
        del _trials[slot]


# ---- the file --------------------------------------------------------------------------------------------------------


def path_for(device: torch.device) -> Path | None:
    """Where the tiles of that GPU lie: $LLMENGINE_TUNED, or by its name in $XDG_CACHE_HOME/llmengine."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return cache_folder() / f"tuned-{name}.json"


def origin(device: torch.device) -> dict[str, Any]:
    """What a file must have in common with the machine that reads it."""
    versions = {"triton": triton.__version__, "llmengine": llmengine.__version__}
    return {"format": FORMAT, "device": device_name(device), "architecture": architecture(device), **versions}


def read(path: Path, device: torch.device) -> Tiles:
    """The file's slots. Raises ValueError, or OSError, where they are not to be used."""
    record = read_json(path, "tuned tiles")
    for name, here in origin(device).items():
        if record.get(name) != here:
            raise ValueError(f"tuned tiles: {path} was made for {name} {record.get(name)!r}; here it is {here!r}")
    tiles = record.get("tiles")
    if not isinstance(tiles, dict):
        raise ValueError(f"tuned tiles: {path} has no object 'tiles'")
    for slot, fields in tiles.items():
        _check(path, slot, fields)
    return tiles


def _check(path: Path, slot: str, fields: Any) -> None:
    names = FIELDS.get(slot.partition(" ")[0])
    if names is None:
        raise ValueError(f"tuned tiles: {path}: {slot!r} is in no table; tables are {', '.join(FIELDS)}")
    if not isinstance(fields, dict) or set(fields) != {*names, *BESIDE}:
        raise ValueError(f"tuned tiles: {path}: {slot!r} must have the fields {', '.join((*names, *BESIDE))}")
    if not isinstance(fields["built_in"], list):
        raise ValueError(f"tuned tiles: {path}: {slot!r} has built_in {fields['built_in']!r}; it must be a list")
    for name in names:
        choices = allowed(name)
        if type(fields[name]) is not int or fields[name] not in choices:
            raise ValueError(f"tuned tiles: {path}: {slot!r} has {name} {fields[name]!r}; allowed: {choices}")


def allowed(field: str) -> tuple[int, ...]:
    return {"warps": WARPS, "stages": STAGES, "height": HEIGHTS}.get(field, SIZES)


def write(path: Path, device: torch.device, tiles: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(origin(device) | {"tiles": tiles}, indent=1) + "\n")


@functools.cache
def _tiles(device: torch.device) -> dict[str, tuple[tuple, dict[str, int]]]:
    """The slots of this device's file, each as (what was built in, fields); none where there is no file to be used."""
    if device.type == "meta" or (path := path_for(device)) is None:
        return {}
    try:
        found = read(path, device)
    except FileNotFoundError as error:
        if VARIABLE in os.environ:
            _warn(error)
        return {}
    except (ValueError, OSError) as error:
        _warn(error)
        return {}
    return {
        slot: (tuple(fields["built_in"]), {name: n for name, n in fields.items() if name not in BESIDE})
        for slot, fields in found.items()
    }


def _warn(error: Exception) -> None:
    advice = "the built-in tiles are used; `llmengine tune` measures anew"
    warnings.warn(f"{error}; {advice}", TunedTableWarning, stacklevel=2)


def forget() -> None:
    """Files are read anew at the next launch."""
    _tiles.cache_clear()
    _another.cache_clear()
