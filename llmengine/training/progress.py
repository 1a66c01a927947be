"""The line that a person watches: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from llmengine.training.metrics import Record
from llmengine.training.observer import Observer
from llmengine.training.run import Run

SECONDS_BETWEEN_LINES = 5.0
SMOOTHING = 0.9  # how much of the mean loss a new record leaves in place


class ProgressLine(Observer):
    """Steps, smoothed loss, speed and time left; evaluations and notices as lines of their own."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._weight = 0.0  # of the records in the mean so far: it starts without a bias to 0
        self._sum = 0.0
        self._printed = 0.0

    def started(self, run: Run, step: int, records: Sequence[Record]) -> None:
        total = sum(p.numel() for p in run.model.parameters())
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        parameters = f"{total:,} parameters" + (f", {trained:,} trained," if trained < total else "")
        todo = f"steps {step + 1} to {run.steps}" if step < run.steps else f"all {run.steps} steps are done"
        self.console.print(
            f"{run.title}: {parameters} on {run.device}, {run.config.precision}, "
            f"{todo}, about {run.batches.steps_per_epoch:,} steps an epoch",
            highlight=False,
            soft_wrap=True,
        )
        for record in records:
            if record["kind"] == "train":
                self._smooth(record["loss"])
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4, transient=True)
            self._task = self._bar.add_task("starting", total=run.steps, completed=step)
            self._bar.start()

    def recorded(self, run: Run, record: Record) -> None:
        if record["kind"] == "evaluation":
            self.console.print(evaluation_line(record), highlight=False, soft_wrap=True)
            return
        self._smooth(record["loss"])
        line = training_line(record, self._sum / self._weight, run.steps)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=line)
        elif self._due(record["step"] == run.steps):
            self.console.print(line, highlight=False, soft_wrap=True)

    def noticed(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def closed(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _smooth(self, loss: float) -> None:
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    def _due(self, last: bool) -> bool:
        now = time.monotonic()
        due = last or self._printed == 0.0 or now - self._printed >= SECONDS_BETWEEN_LINES
        if due:
            self._printed = now
        return due


def training_line(record: Record, loss: float, steps: int) -> str:
    """ "step 120/300  loss 5.432  12,345 tokens/s  1.23 TFLOP/s  0:42 left"."""
    left = (steps - record["step"]) * record["seconds"] / record["step"]
    return (
        f"step {record['step']}/{steps}  loss {loss:.3f}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"{with_prefix(record['flops_per_second'])}FLOP/s  {duration(left)} left"
    )


def evaluation_line(record: Record) -> str:
    """ "step 120  held out: loss 5.1 (mlm 4.5, nsp 0.6), perplexity 90.0, accuracy mlm 21.0 %, nsp 70.1 %"; of
    fine-tuning "step 120  held out: loss 0.310 (classification 0.310), accuracy 0.8710, the best so far"."""
    heads = ", ".join(f"{head} {loss:.3f}" for head, loss in record["losses"].items())
    parts = [f"loss {record['loss']:.3f} ({heads})"]
    if "perplexity" in record:
        parts.append(f"perplexity {record['perplexity']:.1f}")
    if accuracy := ", ".join(f"{head} {100 * share:.1f} %" for head, share in record.get("accuracy", {}).items()):
        parts.append(f"accuracy {accuracy}")
    parts += [f"{name} {score(value)}" for name, value in record.get("scores", {}).items()]
    if record.get("best"):
        parts.append("the best so far")
    return f"step {record['step']}  held out: {', '.join(parts)}"


def score(value: float | None) -> str:
    """Four digits; None: not defined for these rows."""
    return "undefined" if value is None else f"{value:.4f}"


def with_prefix(value: float) -> str:
    """1.23e12 -> "1.23 T"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
