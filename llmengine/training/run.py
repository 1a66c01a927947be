"""A run: what the loop trains, evaluates and writes, whatever kind of training it is; and its folder."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import llmengine
from llmengine.data.batches import Step, StepBatches
from llmengine.data.tokenizer import Tokenizer
from llmengine.metrics import Judgement
from llmengine.optim import AdamW
from llmengine.training.gradients import accumulate
from llmengine.training.memory import StreamMemory
from llmengine.training.metrics import Record
from llmengine.training.optimizer import learning_rate
from llmengine.training.regularisers import Ema, Fgm, Neftune
from llmengine.training.regularisers.neftune import NoiseStream
from llmengine.training.sections import Config, ScheduleSection
from llmengine.training.selection import Selection
from llmengine.training.streams import ADVERSARIAL_NOISE, EMBEDDING_NOISE


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
    def best(self) -> Path:
        """The weights that were the best so far, of runs that select by a score."""
        return self.path / "best"

    @property
    def adapter(self) -> Path:
        """Of a run with adapters: a directory of the package peft."""
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        """The report of a fine-tuned model."""
        return self.path / "evaluation"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def is_empty(self) -> bool:
        return not self.path.exists() or all(entry == self.lock for entry in self.path.iterdir())


@dataclass
class Run(ABC):
    """What the loop knows of a run. A kind of run says how it is prepared, evaluated and what it leaves."""

    config: Config
    title: str
    """What is learnt."""
    steps: int
    schedule: ScheduleSection
    folder: Folder
    device: torch.device
    tokenizer: Tokenizer
    model: Module
    """What is trained: its call takes a micro-batch and num_items_in_batch and gives .loss and .losses."""
    optimizer: AdamW
    batches: StepBatches
    held_out: StepBatches | None
    """What is evaluated on and never trained on."""
    digest: str
    """Of the data: a run goes on with those that it began with."""
    source: str
    """What the data are called in a sentence."""
    selection: Selection | None = None
    """Which weights remain; None: the last."""
    noise: Neftune | None = None
    adversary: Fgm | None = None
    average: Ema | None = None
    memory: StreamMemory | None = None
    """What streams remember; None: examples stand alone."""

    def begin(self) -> None:
        """Writes what a run's folder holds from the start."""
        self.config.to_file(self.folder.config)
        self.tokenizer.save(self.folder.model)

    def rate(self, step: int) -> float:
        """The learning rate of the 0-based step."""
        return learning_rate(self.config.optimizer.lr, self.schedule, step, self.steps)

    def gradients(self, batch: Step, step: int) -> tuple[float, dict[str, float]]:
        """Adds a step's gradients to the parameters'; returns the loss and its parts."""
        given = (self.model, batch, self.device, self.config.precision)
        loss, losses = accumulate(*given, self._noise(EMBEDDING_NOISE, step), self.memory)
        if self.adversary is not None:
            with self.adversary.perturbed():
                losses["fgm"] = accumulate(*given, self._noise(ADVERSARIAL_NOISE, step))[0]
            loss += losses["fgm"]
        return loss, losses

    def _noise(self, stream: int, step: int) -> NoiseStream | None:
        return None if self.noise is None else self.noise.stream(self.config.seed, stream, step)

    def averaged(self) -> AbstractContextManager:
        """While entered the model has the weights that are evaluated and saved."""
        return nullcontext() if self.average is None else self.average.applied()

    @abstractmethod
    def flops(self, batch: Step) -> int:
        """What a step's mathematics needs."""

    @abstractmethod
    def evaluate(self) -> Record | None:
        """Held-out "loss" and "losses", and what else is measured; None where nothing is held out."""

    def state(self) -> dict[str, Tensor]:
        """The weights that a checkpoint holds."""
        return self.model.state_dict()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.model.load_state_dict(tensors)

    @abstractmethod
    def finish(self, whole: bool) -> Judgement | None:
        """Writes the model; returns how the test went, if there is one. whole: the run is not interrupted."""


def model_directory(path: str | Path) -> Path:
    """The model of a run folder; any other path as it is. Raises FileNotFoundError where there is no
    folder, or the run did not end yet."""
    folder = Folder(Path(path))
    if not folder.path.is_dir():
        problem = "is no folder" if folder.path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {problem}; give a model's directory, or a run folder")
    if not folder.config.is_file():
        return folder.path
    if not (folder.model / "config.json").is_file():
        raise FileNotFoundError(f"{path} is a run that has no model yet: it was neither finished nor interrupted")
    return folder.model


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


def surroundings(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on beside the config."""
    return {
        "llmengine": llmengine.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
