"""A run's parts, made from its config alone: corpus, tokenizer, examples, model, optimizer; and its folder."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

import llmengine
from llmengine import convert, objectives
from llmengine.data.batches import StepBatches
from llmengine.data.corpus import read_documents, split_documents
from llmengine.data.tokenizer import Tokenizer
from llmengine.models import Transformer, TransformerConfig
from llmengine.objectives.electra import Electra
from llmengine.training.config import RunConfig
from llmengine.training.optimizer import adamw

INITIAL_WEIGHTS, TRAINING_STEP = 0, 1  # what a stream of random numbers is for


@dataclass(frozen=True)
class Folder:
    """The files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """A Hugging Face directory: the tokenizer from the start, the weights when training ends or is interrupted."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def is_empty(self) -> bool:
        return not self.path.exists() or all(entry == self.lock for entry in self.path.iterdir())


@dataclass
class Run:
    config: RunConfig
    folder: Folder
    device: torch.device
    tokenizer: Tokenizer
    model: Transformer | Electra
    optimizer: torch.optim.AdamW
    batches: StepBatches
    held_out: StepBatches | None
    corpus_digest: str

    def begin(self) -> None:
        """Writes what a run's folder holds from the start."""
        self.config.to_file(self.folder.config)
        self.tokenizer.save(self.folder.model)

    @classmethod
    def prepare(cls, config: RunConfig, folder: Folder, device: torch.device) -> Run:
        """Reads and makes everything; writes nothing."""
        documents = read_documents(config.corpus)
        held_out: Sequence[str] = ()
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        if config.data.held_out:
            documents, held_out = split_documents(documents, config.data.held_out, config.seed)
        tokenizer = tokenizer_of(config, documents, folder.model)
        shape = config.transformer(
            tokenizer.vocab_size, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
        )
        _check_can_be_saved(shape)
        reseed(config.seed, INITIAL_WEIGHTS)
        model = objectives.make_model(config.objective, shape, **config.data.options).to(
            device
        )  # drawn on the CPU: the same weights on every device
        return cls(
            config=config,
            folder=folder,
            device=device,
            tokenizer=tokenizer,
            model=model,
            optimizer=adamw(model, config.optimizer),
            batches=_batches(config, documents, tokenizer, shuffle=True),
            held_out=_batches(config, held_out, tokenizer, shuffle=False) if held_out else None,
            corpus_digest=digest,
        )


def _check_can_be_saved(shape: TransformerConfig) -> None:
    """That the model's family has files for what the config asks: else the run would fail when it is done."""
    if (family := convert.FAMILIES.get(shape.family)) is not None:
        family.write_config(shape.to_dict(), TransformerConfig.defaults())


def _batches(config: RunConfig, documents: Sequence[str], tokenizer: Tokenizer, *, shuffle: bool) -> StepBatches:
    data = config.data
    examples = objectives.build(
        config.objective,
        documents,
        tokenizer,
        sequence_length=data.sequence_length,
        seed=config.seed,
        **data.options,
    )
    accumulation = data.accumulation if shuffle else 1
    return StepBatches(
        examples, batch_tokens=data.batch_tokens, accumulation=accumulation, seed=config.seed, shuffle=shuffle
    )


def tokenizer_of(config: RunConfig, documents: Sequence[str], directory: Path) -> Tokenizer:
    """The run's tokenizer: as saved in `directory`, or, the first time, read or trained as the config says."""
    if (directory / "tokenizer.json").is_file():
        return Tokenizer.load(directory)
    section = config.tokenizer
    if section.path is not None:
        return Tokenizer.load(section.path)
    family = objectives.OBJECTIVES[config.objective].family
    return Tokenizer.train(documents, **section.model_dump(exclude_none=True), family=family)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; allowed: auto, cpu, cuda, cuda:0, …") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} is asked for, but PyTorch sees no CUDA GPU; allowed here: auto, cpu")
    return device


def reseed(seed: int, *stream: int) -> None:
    """Seeds PyTorch's generators, which dropout draws from, by numbers alone: a step replays its draws anywhere."""
    torch.manual_seed(int(numpy.random.SeedSequence((seed, *stream)).generate_state(1, numpy.uint64)[0]))


def surroundings(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on beside the config."""
    return {
        "llmengine": llmengine.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
