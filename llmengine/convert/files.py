"""Checkpoint directories: safetensors read lazily, written atomically. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmengine.files import read_json, replace_text, sync

CONFIG = "config.json"
TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise FileNotFoundError(f"from_pretrained: {directory} is not a directory with {CONFIG} and {TENSORS}")
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {directory} has no {CONFIG}")
    return read_json(path, "from_pretrained")


def tensor_files(directory: Path) -> dict[str, Path]:
    """Every tensor's file. A single file comes before an index of shards, as in Hugging Face's loaders."""
    path = directory / TENSORS
    if path.is_file():
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX, "from_pretrained").get("weight_map")
        if not weight_map:
            raise ValueError(f"from_pretrained: {directory / INDEX} has no weight_map")
        if lost := sorted({file for file in weight_map.values() if not (directory / file).is_file()}):
            raise FileNotFoundError(f"from_pretrained: {directory} lacks the shards {', '.join(lost)} of {INDEX}")
        return {name: directory / file for name, file in weight_map.items()}
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    remedy = (
        f"; {', '.join(pickled)} are pickles, which can run code and are not read: "
        "load them in Hugging Face transformers and save_pretrained once, which writes safetensors"
        if pickled
        else ""
    )
    raise FileNotFoundError(f"from_pretrained: {directory} has no {TENSORS}{remedy}")


def read_tensor(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        return file.get_tensor(name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"from_pretrained: {path} is not a whole safetensors file: {error}") from None


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Both files, whole or not at all: a new directory appears at once, in an old one each file is replaced at once."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save_pretrained: {directory} is a file; give a directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    parent = directory if directory.is_dir() else directory.parent
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=parent))
    try:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_tensors(temporary / TENSORS, tensors, metadata={"format": "pt"})
        replace_text(temporary / CONFIG, text)
        if directory.is_dir():
            for name in (TENSORS, CONFIG):
                os.replace(temporary / name, directory / name)
            (directory / INDEX).unlink(missing_ok=True)  # of the shards that were there before
        else:
            temporary.chmod(0o777 & ~_umask())
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Returns when the file is on the disk. Raises OSError, with errno.ENOSPC where the disk is full."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        # its I/O errors carry the operating system's number in their text only
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    sync(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
