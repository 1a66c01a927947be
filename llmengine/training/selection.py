"""Which evaluation was the best so far, its weights, and when to stop waiting for a better one."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmengine.training import checkpoint
from llmengine.training.metrics import Record


@dataclass(frozen=True)
class Best:
    step: int
    name: str
    """Of the score."""
    value: float
    loss: float


class Selection:
    """Follows the score that an evaluation's record names: {"select": name, "lower_is_better": bool, …}.

    Weights are kept as checkpoints of their own, which stay as long as the run may be resumed at a step that knows no
    better ones.
    """

    def __init__(self, directory: Path, *, patience: int | None = None, min_delta: float = 0.0) -> None:
        """patience: so many evaluations that are better by no more than min_delta, one after another, end the run."""
        self.directory, self.patience, self.min_delta = directory, patience, min_delta
        self.best: Best | None = None
        self.waited = 0
        self._mark: float | None = None  # the score that patience waits to be exceeded

    @property
    def over(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def seen(self, record: Record) -> bool:
        """Whether this evaluation is the best so far; of equal scores the one with the lower loss is. A score that is
        not known is never the best."""
        name = record["select"]
        value = record["loss"] if name == "loss" else record["scores"][name]
        sign = -1 if record["lower_is_better"] else 1
        if value is None or not math.isfinite(value):
            self.waited += 1
            return False
        if self._mark is None or sign * (value - self._mark) > self.min_delta:
            self._mark, self.waited = value, 0
        else:
            self.waited += 1
        loss, best = record["loss"], self.best
        better = best is None or (sign * value, -loss) > (sign * best.value, -best.loss)
        if better:
            self.best = Best(record["step"], name, value, loss)
        return better

    # ---- weights -----------------------------------------------------------------------------------------------------

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Writes the best weights."""
        assert self.best is not None
        checkpoint.save(self.directory, self.best.step, {"model": tensors}, asdict(self.best))

    def weights(self) -> dict[str, Tensor] | None:
        """The best weights; None: there was no evaluation yet. Raises checkpoint.Unreadable."""
        if self.best is None:
            return None
        return checkpoint.read(checkpoint.place(self.directory, self.best.step)).tensors("model")

    def prune(self, oldest: int) -> None:
        """Removes what was the best no more at step `oldest`, which is that of the oldest checkpoint."""
        kept = checkpoint.paths(self.directory)
        still = [path for path in kept if checkpoint.step_of(path) > oldest]
        checkpoint.prune(self.directory, len(still) + 1)

    # ---- checkpoints of the run --------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        return {"best": self.best and asdict(self.best), "waited": self.waited, "mark": self._mark}

    def restore(self, facts: dict[str, Any], step: int) -> None:
        """As it was at `step`. Checks that the best weights are there and whole; later ones are forgotten."""
        self.best = Best(**facts["best"]) if facts["best"] else None
        self.waited, self._mark = facts["waited"], facts["mark"]
        for path in checkpoint.paths(self.directory):
            if checkpoint.step_of(path) > step:
                shutil.rmtree(path)
        self.weights()
