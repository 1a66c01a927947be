"""`llmengine finetune`: trains a pretrained model for a task, as a config file, or flags, say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmengine.cli.common import (
    SIGNALS,
    ConfigPath,
    Debug,
    Overrides,
    Resume,
    as_overrides,
    one_or_several,
    program,
    reported,
    resumed,
)
from llmengine.cli.fine_tuned import Columns, DataKind, columns_of

if TYPE_CHECKING:
    from llmengine.training import FinetuneConfig, Result

EXAMPLES = """\
  llmengine finetune --task classification --model runs/bert --train train.csv
  llmengine finetune --task seq2seq --model runs/bart --train a.en --train a.de --kind parallel
  llmengine finetune sentiment.yaml --output runs/sentiment
  llmengine finetune --task classification --model DIR --train a.jsonl --test b.jsonl --set optimizer.lr=2e-5
  llmengine finetune --resume runs/sentiment"""


@reported
def command(
    config: ConfigPath = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run folder; default runs/ and the config's name.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="What the model is to do: classification, tagging, qa, …")] = None,
    model: Annotated[str | None, typer.Option(help="A pretrained model's directory, or a run folder.")] = None,
    train: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Rows: JSON lines, CSV, TSV, CoNLL, … May be repeated.")
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Rows to choose the best weights by; default a tenth of those to train on."),
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Rows to judge the model by in the end.")
    ] = None,
    column: Columns = None,
    kind: DataKind = None,
    epochs: Annotated[float | None, typer.Option(help="How often each row is seen.")] = None,
    overrides: Overrides = None,
    resume: Resume = None,
    debug: Debug = False,
) -> None:
    """Train a pretrained model for a task.

    Leaves a run folder: config, metrics, loss curve, checkpoints, and the best weights as a model directory.
    Ctrl-C saves and stops; --resume goes on.
    """
    from llmengine.training import FinetuneConfig, ProgressLine
    from llmengine.training import train as train_model
    from llmengine.training.plot import LossPlot

    given = {
        "task": task, "model": model, "train": one_or_several(train), "validation": one_or_several(validation),
        "test": one_or_several(test), "epochs": epochs, "format.kind": kind,
        **{f"columns.{name}": theirs for name, theirs in columns_of(column).items()},
    }  # fmt: skip
    changes = [*as_overrides(given), *(overrides or [])]
    if resume is not None:
        run_config, output = resumed(FinetuneConfig, config, output, resume, changes), resume
    else:
        run_config = _config(config, changes)
        output = output or Path("runs") / (config.stem if config is not None else run_config.task)
    result = train_model(run_config, output, resume=resume is not None, observers=[ProgressLine(), LossPlot()])
    typer.echo(summary(run_config, result))
    if result.interrupted:
        raise typer.Exit(128 + SIGNALS[result.interrupted])


def _config(path: Path | None, changes: list[str]) -> FinetuneConfig:
    from llmengine.training import FinetuneConfig
    from llmengine.training.config_file import overridden

    if path is not None:
        return FinetuneConfig.from_file(path, changes)
    fields = overridden({}, changes)
    missing = [f"--{name}" for name in ("task", "model", "train") if name not in fields]
    if missing:
        raise ValueError(
            f"finetune needs a config file, or flags: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing (llmengine finetune --help)"
        )
    return FinetuneConfig.from_dict(fields)


# ---- the end ---------------------------------------------------------------------------------------------------------


def summary(config: FinetuneConfig, result: Result) -> str:
    """What came out, where it is, and what to do next."""
    from llmengine.training import metrics
    from llmengine.training.plot import smoothed
    from llmengine.training.progress import duration, evaluation_line, score
    from llmengine.training.report import REPORT, score_lines
    from llmengine.training.run import Folder

    folder = Folder(result.output)
    records = metrics.read(folder.metrics)
    train = [record for record in records if record["kind"] == "train"]
    lines = [""]
    if train:
        losses, seconds = [record["loss"] for record in train], train[-1]["seconds"]
        lines.append(
            f"loss      {losses[0]:.3f} -> {smoothed(losses)[-1]:.3f} in {result.step:,} steps, {duration(seconds)}"
        )
    best = result.best
    if best is not None:
        chosen = next(r for r in records if r["kind"] == "evaluation" and r["step"] == best.step)
        lines += [
            f"best      {best.name} {score(best.value)} on held-out rows at step {best.step}: the weights that remain",
            f"held out  {evaluation_line(chosen).partition('held out: ')[2]}",
        ]
    if result.test is not None:
        lines += _beside("test", score_lines(result.test))
    files = ["loss.png", "metrics.jsonl", "config.yaml", "checkpoints/"]
    files += ["adapter/"] if config.lora is not None else []
    files += [f"{folder.evaluation.name}/{REPORT}"] if result.test is not None else []
    lines += [
        f"files     {folder.path}/: {', '.join(files)}",
        f"model     {folder.model}",
        *_beside("next", _next_commands(config, result)),
    ]
    return "\n".join(lines)


def _beside(name: str, lines: list[str]) -> list[str]:
    return [f"{name if i == 0 else '':10}{line}" for i, line in enumerate(lines)]


def _next_commands(config: FinetuneConfig, result: Result) -> list[str]:
    call, run = program(), shlex.quote(str(result.output))
    commands = [f"{call} finetune --resume {run}"] if result.interrupted else []
    commands.append(f"{call} predict {run} {_question(config)}")
    if config.test is not None or config.validation != 0:
        commands.append(f"{call} evaluate {run}")
    return commands


def _question(config: FinetuneConfig) -> str:
    """What `predict` can ask the task's model: a text, two, or the rows of a file of the run's."""
    from llmengine.tasks.task import class_of

    asked = set(class_of(config.task).asked) - {"text_pair"}
    if len(asked) == 1:
        return '--text "…"'
    if "context" in asked:
        return '--text "…" --pair "…"'
    files = config.test or config.train
    return " ".join(f"--data {shlex.quote(file)}" for file in ([files] if isinstance(files, str) else files))
