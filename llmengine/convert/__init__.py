"""Checkpoints of other toolkits, in and out: a table per family (bert.py, gpt.py, …), and our own layout.

A new family is one file with a `Family` and one word in FAMILIES. Other toolkits' files (fairseq.py, …) and
directories (eole.py) are read only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmengine.convert import eole, fairseq, files, gguf, opennmt
from llmengine.convert.bart import BART, MARIAN, MBART
from llmengine.convert.bert import ALBERT, BERT, ELECTRA, ROBERTA, XLM_ROBERTA
from llmengine.convert.family import Family
from llmengine.convert.foreign import Foreign, unpickle
from llmengine.convert.gpt import GPT, GPT2, GPT_NEO, GPT_NEOX
from llmengine.convert.llama import GEMMA, GEMMA2, GEMMA3, LLAMA, MISTRAL, QWEN2, QWEN3
from llmengine.convert.modernbert import MODERNBERT
from llmengine.convert.t5 import T5
from llmengine.convert.xlnet import XLNET

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        BERT, ROBERTA, XLM_ROBERTA, ALBERT, ELECTRA, MODERNBERT, GPT, GPT2, GPT_NEO, GPT_NEOX, LLAMA, MISTRAL, QWEN2,
        QWEN3, GEMMA, GEMMA2, GEMMA3, BART, MBART, MARIAN, T5, XLNET,
    )
}  # fmt: skip
OWN = "llmengine"  # model_type of our own layout

__all__ = ["FAMILIES", "Checkpoint", "Family", "save"]


class Checkpoint:
    """A directory, or another toolkit's file, opened for reading: `fields` for TransformerConfig, `tensors` for its
    model."""

    family: Family | None
    fields: Mapping[str, Any]
    files: Mapping[str, Any]
    """A place for each tensor's name, from which `_get` reads it."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._get: Callable[[str], Tensor]
        if self.path.is_file():
            self._take(read_file(self.path))
        else:
            self._open_directory()

    def _take(self, foreign: Foreign) -> None:
        self.family, self.fields, self.files = foreign.family, foreign.fields, foreign.tensors
        self._get = foreign.tensors.__getitem__

    def _open_directory(self) -> None:
        config = files.read_config(self.path)
        if eole.recognises(config):
            return self._take(eole.read(self.path, config))
        model_type = config.get("model_type")
        if model_type != OWN and model_type not in FAMILIES:
            known = ", ".join([*FAMILIES, OWN])
            raise ValueError(f"from_pretrained: model_type {model_type!r} in {self.path} is not one of {known}")
        self.family = FAMILIES.get(model_type)
        self._get = lambda name: files.read_tensor(*self.files[name])
        self.files = {name: (path, name) for name, path in files.tensor_files(self.path).items()}
        if self.family is None:
            self.fields = config["config"]
            return
        has_prefix = any(name.startswith(self.family.prefix) for name in self.files)
        self.files = {self.family.canonical(name, has_prefix): place for name, place in self.files.items()}
        fields = self.family.read_config(config, self.files)
        self.fields = fields | self.family.read_ties(self.files, self._get, fields)

    def tensors(self, wanted: Iterable[str], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        """Our tensors by name, for a model of these config fields. ValueError where some are missing or the file has
        others."""
        if self.family is not None:
            return self.family.read_tensors(self.files, self._get, wanted, fields)
        wanted = set(wanted)
        if missing := sorted(wanted - self.files.keys()):
            raise ValueError(f"from_pretrained: {self.path} lacks {', '.join(missing)}")
        return {name: self._get(name) for name in wanted}


def read_file(path: Path) -> Foreign:
    """A checkpoint that is one file of another toolkit; ValueError where it is none that llmengine reads."""
    if gguf.recognises(path):
        return gguf.read(path)
    content = unpickle(path)
    if opennmt.recognises(content):
        return opennmt.read(content)
    if fairseq.recognises(content):
        return fairseq.read(path, content)
    raise ValueError(
        f"{path} is no checkpoint of Fairseq, OpenNMT-py or llama.cpp (GGUF); Hugging Face's and ours are directories"
    )


def save(
    directory: str | os.PathLike, fields: Mapping[str, Any], defaults: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a model of these TransformerConfig fields (and their defaults) in its family's layout, or in our own."""
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    family = FAMILIES.get(fields["family"])
    if family is None:
        config: dict[str, Any] = {"model_type": OWN, "config": dict(fields)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    else:
        config = family.write_config(fields, defaults)
        tensors = family.write_tensors(tensors, fields)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(dtypes) == 1 and family is not None:
        config["dtype"] = dtypes.pop()
    files.write(Path(directory), config, tensors)
