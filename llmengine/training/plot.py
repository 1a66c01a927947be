"""loss.png: what training was like so far, drawn from the records of metrics.jsonl."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmengine.files import replace_bytes
from llmengine.training.metrics import Record
from llmengine.training.observer import Observer

if TYPE_CHECKING:
    from llmengine.training.loop import Result
    from llmengine.training.run import Run

FILE = "loss.png"
NAMES = {"mlm": "masked tokens (mlm)", "nsp": "next sentence (nsp)", "clm": "next token (clm)"}


class LossPlot(Observer):
    """Draws at each evaluation and at the end."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def started(self, run: Run, step: int, records: Sequence[Record]) -> None:
        self._records = list(records)

    def recorded(self, run: Run, record: Record) -> None:
        self._records.append(record)
        if record["kind"] == "evaluation":
            draw(self._records, run.folder.path / FILE, title=run.folder.path.name)

    def finished(self, run: Run, result: Result) -> None:
        draw(self._records, run.folder.path / FILE, title=run.folder.path.name)


def draw(records: Sequence[Record], path: Path, title: str = "") -> None:
    """Train loss (each record, and smoothed) and held-out loss, a panel per head; below them the score that selects
    weights, where one does, and the learning rate.

    The file is replaced whole or not at all. Without train records nothing is drawn.
    """
    # a figure of its own, not pyplot's: no display, and none of the caller's figures are touched
    from matplotlib.figure import Figure

    train = [record for record in records if record["kind"] == "train"]
    if not train:
        return
    held_out = [record for record in records if record["kind"] == "evaluation"]
    heads = list(train[0]["losses"])
    scored = [record for record in held_out if record.get("select") in record.get("scores", {})]
    large = len(heads) + bool(scored)
    figure = Figure(figsize=(9, 3.2 * large + 1.8), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(large + 1, 1, sharex=True, squeeze=False, height_ratios=[*[3.0] * large, 1.2]).ravel()
    for panel, head in zip(panels, heads, strict=False):
        _loss(panel, head, train, held_out)
    if scored:
        _score(panels[-2], scored)
    rate = panels[-1]
    rate.plot([r["step"] for r in train], [r["lr"] for r in train], color="tab:green")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.set_ylim(bottom=0)
    rate.grid(alpha=0.3)
    figure.align_ylabels()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    replace_bytes(path, image.getvalue())


def _loss(panel: Any, head: str, train: Sequence[Record], held_out: Sequence[Record]) -> None:
    steps, losses = [r["step"] for r in train], [r["losses"][head] for r in train]
    panel.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="train")
    panel.plot(steps, smoothed(losses), color="tab:blue", label="train, smoothed")
    measured = [(r["step"], r["losses"][head]) for r in held_out if head in r["losses"]]
    if measured:
        panel.plot(*zip(*measured, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")
    panel.set_ylabel(f"loss: {NAMES.get(head, head)}")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper right")


def _score(panel: Any, scored: Sequence[Record]) -> None:
    """The score that selects weights; a ring around the best."""
    name = scored[-1]["select"]
    points = [(r["step"], r["scores"][name], r.get("best")) for r in scored if r["scores"][name] is not None]
    panel.plot(
        [p[0] for p in points], [p[1] for p in points], color="tab:orange", marker="o", markersize=4, label="held out"
    )
    best = [(step, value) for step, value, is_best in points if is_best][-1:]
    panel.plot(
        [b[0] for b in best], [b[1] for b in best], "o", markersize=10, fillstyle="none", color="tab:red", label="best"
    )
    panel.set_ylabel(name)
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the run, without a pull towards the start value."""
    keep = math.exp(-1 / max(1.0, len(values) / 50))
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means
