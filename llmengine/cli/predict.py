"""`llmengine predict`: a fine-tuned model's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmengine.cli import fine_tuned
from llmengine.cli.common import Debug, ModelPath, reported
from llmengine.cli.fine_tuned import Columns, Data, DataFormat, DataKind

if TYPE_CHECKING:
    from llmengine.tasks import Answer, Row

EXAMPLES = """\
  llmengine predict runs/sentiment --text "A film to see twice."
  llmengine predict runs/squad --text "Who came?" --pair "The text: Ann came."
  llmengine predict runs/sentiment --data reviews.csv --column text=review --output predictions.jsonl"""


@reported
def command(
    run: ModelPath,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text. May be repeated.")] = None,
    pair: Annotated[
        str | None, typer.Option(help="What belongs to the text: a second one, a question's context.")
    ] = None,
    data: Data = None,
    column: Columns = None,
    kind: DataKind = None,
    format: DataFormat = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file of JSON lines: each row and its prediction.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a batch.")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    debug: Debug = False,
) -> None:
    """Answer questions.

    About texts, or about the rows of files, which need no labels. Prints the answers, or writes them beside the rows.
    """
    from llmengine.training.report import write_predictions

    if bool(text) == bool(data):
        raise ValueError('give what is to be answered: --text "…", or --data FILE' + " (not both)" * bool(text))
    if pair is not None and not text:
        raise ValueError("--pair belongs to a --text")
    tuned = fine_tuned.load(run, device)
    task = tuned.task
    if text:
        rows = [fine_tuned.question(task, each, pair) for each in text]
    else:
        # of the run's columns those that are asked: labels may be missing
        columns = {name: theirs for name, theirs in tuned.columns.items() if name in task.asked}
        data = data or []
        written = tuned.format(data, kind, fine_tuned.format_of(format))
        if written.get("kind") == "parallel" and len(data) == 1:
            written["kind"] = "text"  # sources without their targets
        read = fine_tuned.read(data, written, columns | fine_tuned.columns_of(column))
        rows = [fine_tuned.asking(task, row) for row in read]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    answers = task.answers(tuned.model, rows, batch_tokens=batch_tokens)
    if output is not None:
        write_predictions(output, rows, list(answers))
        typer.echo(f"wrote  {output}: {len(rows):,} predictions, weights of {tuned.source}")
        return
    for row, answer in zip(rows, answers, strict=True):
        typer.echo(json.dumps(answer, ensure_ascii=False) if as_json or data else "\n".join(describe(row, answer)))


def describe(row: Row, answer: Answer) -> Iterator[str]:
    """An answer for a person."""
    if "text" in answer or "value" in answer:
        yield str(answer.get("text", answer.get("value")))
    elif "tags" in answer:
        width = max(map(len, row["words"]), default=0)
        yield from (f"{word:{width}}  {tag}" for word, tag in zip(row["words"], answer["tags"], strict=True))
    elif isinstance(answer.get("scores"), Mapping):
        given = answer.get("labels", [answer.get("label")])
        for label, score in sorted(answer["scores"].items(), key=lambda item: -item[1]):
            yield f"{'*' if label in given else ' '} {100 * score:5.1f} %  {label}"
    elif "answer" in answer:
        yield f"{answer['answer'] or '(no answer)'}  ({answer['score']:.3f})"
    else:
        yield json.dumps(answer, ensure_ascii=False)
