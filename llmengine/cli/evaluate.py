"""`llmengine evaluate`: how good a model is on data that it was not trained on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmengine.cli import fine_tuned, models
from llmengine.cli.common import Debug, ModelPath, reported
from llmengine.cli.fine_tuned import Columns, Data, DataFormat, DataKind, FineTuned

if TYPE_CHECKING:
    from llmengine.tasks import Row

EXAMPLES = """\
  llmengine evaluate runs/gpt
  llmengine evaluate runs/gpt --corpus other_texts/ --json
  llmengine evaluate runs/sentiment
  llmengine evaluate runs/sentiment --data test.csv --column text=review --output report/"""


@reported
def command(
    run: ModelPath,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Of a pretrained model: texts (default: what the run held out). May be repeated."),
    ] = None,
    data: Data = None,
    column: Columns = None,
    kind: DataKind = None,
    format: DataFormat = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The report's folder. Default: evaluation/ in the run's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Of a fine-tuned model: the most tokens of a batch.")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    debug: Debug = False,
) -> None:
    """Measure how good a model is.

    A pretrained one: loss and accuracy on the texts that the run held out, or on another corpus. A fine-tuned one: the
    scores of its task, with 95 % intervals, on the run's test rows (else its validation rows), or on other files; and a
    report with the worst mistakes.
    """
    fine_tuned.check_exists(run)
    if fine_tuned.is_fine_tuned(run):
        _refuse("a fine-tuned model is judged on rows: --data FILE", corpus=corpus)
        tuned = fine_tuned.load(run, device)
        _refuse("goes with --data", **({} if data else {"column": column, "kind": kind, "format": format}))
        if data:
            written = tuned.format(data, kind, fine_tuned.format_of(format))
            rows: Sequence[Row] = fine_tuned.read(data, written, tuned.columns | fine_tuned.columns_of(column))
            files = data
        else:
            rows, files = fine_tuned.held_out(tuned)
        output = output or _folder(tuned, run, data)
        _judge(tuned, run, rows, files, output, as_json, batch_tokens)
    else:
        reason = "only for fine-tuned models; this one is judged on texts: --corpus FILE"
        _refuse(reason, data=data, column=column, kind=kind, format=format, output=output)
        result = _measured(run, corpus, device)
        typer.echo(json.dumps(result, indent=2) if as_json else describe(result))


def _refuse(reason: str, **options: Any) -> None:
    for name, given in options.items():
        if given:
            raise ValueError(f"--{name}: {reason}")


# ---- pretrained ------------------------------------------------------------------------------------------------------


def _measured(run: Path, corpus: list[str] | None, device: str) -> dict[str, Any]:
    from llmengine import objectives
    from llmengine.data import StepBatches, read_corpus, split_corpus
    from llmengine.training.evaluation import evaluate

    trained = models.load(run, device)
    config = trained.config
    if config is None:
        raise ValueError(f"{run} is a model directory; give its run folder, which knows objective and sequence length")
    documents = read_corpus(corpus or config.corpus, pairs=objectives.OBJECTIVES[config.objective].pairs)
    if not corpus:
        if not config.data.held_out:
            raise ValueError(f"{run} held out nothing (data.held_out: 0); give texts: --corpus FILE")
        documents = split_corpus(documents, config.data.held_out, config.seed)[1]
    data = config.data
    examples = objectives.build(
        config.objective, documents, trained.tokenizer,
        sequence_length=data.sequence_length, seed=config.seed, **data.options,
    )  # fmt: skip
    batches = StepBatches(examples, batch_tokens=data.batch_tokens, seed=config.seed, shuffle=False)
    device_of = trained.model.words.weight.device
    result = evaluate(trained.model, batches, device_of, config.precision)
    return result | {"examples": len(examples), "weights": str(trained.source)}


def describe(result: dict) -> str:
    lines = [f"loss        {result['loss']:.4f}"]
    if len(result["losses"]) > 1:
        lines += [f"  {head:10}{loss:.4f}" for head, loss in result["losses"].items()]
    lines.append(f"perplexity  {result['perplexity']:.2f}")
    lines += [f"accuracy    {100 * share:.1f} % ({head})" for head, share in result.get("accuracy", {}).items()]
    return "\n".join([*lines, f"on {result['examples']:,} examples, weights of {result['weights']}"])


# ---- fine-tuned ------------------------------------------------------------------------------------------------------


def _judge(
    tuned: FineTuned, run: Path, rows: Sequence[Row], files: list[str], output: Path | None, as_json: bool,
    batch_tokens: int,
) -> None:  # fmt: skip
    from llmengine.training import report

    task = tuned.task
    # rows that hold nothing to judge by are an error before all of them are answered; what is told, is told then
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task.judge(rows[:1], list(task.answers(tuned.model, rows[:1])))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    answers = list(task.answers(tuned.model, rows, batch_tokens=batch_tokens))
    judgement = task.judge(rows, answers)
    account = report.of_run(run, task, files, tuned.config)
    if output is not None:
        report.write(output, judgement, rows, answers, asked=task.asked, **account)
    if as_json:
        found = {**report.as_json(judgement), "facts": account["facts"]}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    typer.echo("\n".join(report.score_lines(judgement)))
    typer.echo(f"on {len(rows):,} rows of {', '.join(map(report.shown, files))}, weights of {tuned.source}")
    if output is not None:
        typer.echo(f"report  {output / report.REPORT}")


def _folder(tuned: FineTuned, run: Path, data: list[str] | None) -> Path | None:
    """Of the report, where nobody says: in a run's folder, for other files than its own beside that of its own."""
    from llmengine.training.run import Folder

    if tuned.config is None:
        return None
    own = Folder(run).evaluation
    return own.with_name(f"{own.name}-{Path(data[0]).name.partition('.')[0]}") if data else own
