"""`llmengine train`: pretrains a model as a config file, or flags, say."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from llmengine.training import Result, RunConfig
    from llmengine.training.metrics import Record

EXAMPLES = """\
  llmengine train examples/train_gpt.yaml --output runs/gpt
  llmengine train examples/train_bert.yaml --set corpus=my_texts/ --set optimizer.lr=3e-4
  llmengine train --corpus my.txt --objective clm --preset gpt-mini --steps 1000
  llmengine train --resume runs/gpt"""

# what flags alone leave open
PRESETS, STEPS = {"clm": "gpt-mini", "bert": "bert-mini", "mlm": "bert-mini"}, 1000


@reported
def command(
    config: ConfigPath = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run folder; default runs/ and the config's name.")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help='A text or JSON-lines file, a folder of such, or "austen"; repeatable. Or what tokenize wrote.'
        ),
    ] = None,
    objective: Annotated[str | None, typer.Option(help="What to learn: bert, mlm, clm, denoising, …")] = None,
    preset: Annotated[str | None, typer.Option(help="The model: gpt-mini, bert-base, …")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    overrides: Overrides = None,
    resume: Resume = None,
    debug: Debug = False,
) -> None:
    """Pretrain a model.

    Leaves a run folder: config, metrics, loss curve, samples, checkpoints, and the model as a Hugging Face directory.
    Ctrl-C saves and stops; --resume goes on.
    """
    from llmengine.training import ProgressLine, RunConfig, train
    from llmengine.training.plot import LossPlot
    from llmengine.training.samples import Samples

    flags = _flags(corpus, objective, preset, steps)
    if resume is not None:
        run_config, output = resumed(RunConfig, config, output, resume, [*flags, *(overrides or [])]), resume
    else:
        run_config = _config(config, flags, overrides or [])
        output = output or Path("runs") / (config.stem if config is not None else run_config.objective)
    result = train(run_config, output, resume=resume is not None, observers=[ProgressLine(), LossPlot(), Samples()])
    typer.echo(summary(run_config, result))
    if result.interrupted:
        raise typer.Exit(128 + SIGNALS[result.interrupted])


# ---- config ----------------------------------------------------------------------------------------------------------


def _flags(corpus: list[str] | None, objective: str | None, preset: str | None, steps: int | None) -> list[str]:
    """Flags as overrides."""
    given: dict[str, Any] = {
        "corpus": one_or_several(corpus),
        "objective": objective,
        "model.preset": preset,
        "steps": steps,
    }
    return as_overrides(given)


def _config(path: Path | None, flags: list[str], overrides: list[str]) -> RunConfig:
    from llmengine.objectives import OBJECTIVES
    from llmengine.training import RunConfig
    from llmengine.training.config_file import overridden

    if path is not None:
        return RunConfig.from_file(path, [*flags, *overrides])
    fields = overridden({}, [*flags, *overrides])
    missing = [f"--{name}" for name in ("corpus", "objective") if name not in fields]
    if missing:
        raise ValueError(
            f"train needs a config file, or flags: {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing (llmengine train --help)"
        )
    fields.setdefault("steps", STEPS)
    model = fields.setdefault("model", {})
    if not model and fields["objective"] in PRESETS:
        fields["model"] = {"preset": PRESETS[fields["objective"]]}
    elif not model and fields["objective"] in OBJECTIVES:
        raise ValueError(
            f'objective "{fields["objective"]}" has no model of its own: give one of its architecture, '
            f"{OBJECTIVES[fields['objective']].architecture}, by --preset, or a config file (examples/)"
        )
    return RunConfig.from_dict(fields)


# ---- the end ---------------------------------------------------------------------------------------------------------


def summary(config: RunConfig, result: Result) -> str:
    """What came out, where it is, and what to do next."""
    from llmengine.training import metrics
    from llmengine.training.plot import smoothed
    from llmengine.training.progress import duration, evaluation_line
    from llmengine.training.run import Folder
    from llmengine.training.samples import FILE

    folder = Folder(result.output)
    records = [r for r in metrics.read(folder.metrics) if r["kind"] == "train"]
    lines = [""]
    if records:
        last, losses = records[-1], [r["loss"] for r in records]
        speed = last["tokens"] / max(last["seconds"], 1e-9)
        lines += [
            f"loss      {losses[0]:.3f} -> {smoothed(losses)[-1]:.3f} in {result.step:,} steps",
            f"speed     {last['tokens']:,} tokens in {duration(last['seconds'])}, {speed:,.0f} tokens/s",
        ]
    if result.evaluation is not None:
        lines.append(f"held out  {evaluation_line(result.evaluation).partition('held out: ')[2]}")
        lines += [f"          {sentence}" for sentence in in_words(result.evaluation)]
    lines += [
        f"read      {folder.path / FILE}: what it made of the same texts before, while and after it learnt",
        f"files     {folder.path}/: loss.png, metrics.jsonl, config.yaml, checkpoints/",
        f"model     {folder.model} (transformers' from_pretrained loads it)",
        "next      " + "\n          ".join(_next_commands(config, result)),
    ]
    return "\n".join(lines)


MEANINGS = {
    "mlm": "of the hidden tokens it guesses {}",
    "plm": "of the hidden tokens it guesses {}",
    "nsp": "whether one text follows another it tells in {} of the cases (by chance: in half of them)",
    "sop": "which of two texts comes first it tells in {} of the cases (by chance: in half of them)",
    "rtd": "whether a token was replaced it tells in {} of the cases (most were not)",
}  # of accuracies


def in_words(evaluation: Record) -> Iterator[str]:
    """What an evaluation's scores mean, on texts that the model was not trained on."""
    for head, share in evaluation.get("accuracy", {}).items():
        yield MEANINGS[head].format(f"{100 * share:.0f} %")
    if not {"mlm", "plm"} & evaluation["losses"].keys():
        yield f"it is as unsure of a token as among {evaluation['perplexity']:,.0f} equally probable ones (perplexity)"


def _next_commands(config: RunConfig, result: Result) -> list[str]:
    from llmengine.objectives import model_heads

    call, run = program(), shlex.quote(str(result.output))
    commands = [f"{call} train --resume {run}"] if result.interrupted else []
    if config.objective == "clm":
        commands.append(f'{call} generate {run} --prompt "It was"')
    elif "mlm" in model_heads(config.objective):
        commands.append(f'{call} fill {run} "She was [MASK] happy."')
    return [*commands, f"{call} evaluate {run}"]
