"""What is left of a judgement: report.md, scores.json, predictions.jsonl, and confusion.png where there are classes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmengine.files import replace_text
from llmengine.metrics import Confusion, Judgement, Score
from llmengine.metrics.score import RESAMPLES
from llmengine.tasks import Answer, Row, Task
from llmengine.training import confusion as picture
from llmengine.training.markdown import excerpt, number, table
from llmengine.training.mistakes import mistakes

if TYPE_CHECKING:
    from llmengine.training.finetune_config import FinetuneConfig

REPORT, SCORES, PREDICTIONS = "report.md", "scores.json", "predictions.jsonl"
SOURCES = ("model", "train", "validation", "test", "teacher")  # fields of a config that are no settings but paths
MISTAKES, CONFUSIONS = 20, 10  # that are shown
CHARACTERS = 240  # of a text that is shown


def write(
    folder: Path,
    judgement: Judgement,
    rows: Sequence[Row],
    answers: Sequence[Answer],
    *,
    asked: Sequence[str],
    facts: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the files into `folder`, which is made where it is missing; each is replaced whole or not at all.

    asked: the columns of a row that are the question. facts: what the model, its task and the data are; settings: the
    run's. Both are written as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / PREDICTIONS, rows, answers)
    scores = {**as_json(judgement), "facts": dict(facts)}
    replace_text(folder / SCORES, json.dumps(scores, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if judgement.confusion is None:
        (folder / picture.FILE).unlink(missing_ok=True)  # an earlier report's
    else:
        picture.draw(judgement.confusion, folder / picture.FILE)
    parts = _sections(judgement, rows, answers, asked, facts, settings)
    replace_text(folder / REPORT, "\n\n".join(parts) + "\n")


def of_run(
    run: Path, task: Task, files: Sequence[str | Path], config: FinetuneConfig | None
) -> dict[str, dict[str, Any]]:
    """`facts` and `settings` for `write`. run: the run's folder, or a model directory; files: the rows'."""
    facts: dict[str, Any] = {"model": shown(run), "task": task.name, "data": [shown(file) for file in files]}
    if config is None:
        return {"facts": facts}
    if isinstance(config.model, str):
        facts["fine-tuned from"] = shown(config.model)
    settings = {name: value for name, value in config.to_dict().items() if name not in SOURCES}
    return {"facts": facts, "settings": settings}


def shown(path: str | Path) -> str:
    """A path as it is; the name alone where it tells how this machine is laid out."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def write_predictions(path: Path, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
    """A line per row: its columns, and "prediction", the model's answer."""
    lines = (
        json.dumps({**row, "prediction": answer}, ensure_ascii=False, default=str)
        for row, answer in zip(rows, answers, strict=True)
    )
    replace_text(path, "".join(f"{line}\n" for line in lines))


def as_json(judgement: Judgement) -> dict[str, Any]:
    """A judgement as JSON holds it; what is unknown or infinite is null."""
    found: dict[str, Any] = {
        "rows": judgement.rows,
        "main": judgement.main,
        "lower_is_better": judgement.lower_is_better,
        "scores": {name: _score_json(score) for name, score in judgement.scores.items()},
        "tables": [
            {
                "title": each.title,
                "columns": each.columns,
                "rows": [[_finite(cell) for cell in row] for row in each.rows],
            }
            for each in judgement.tables
        ],
    }
    if judgement.confusion is not None:
        found["confusion"] = {"labels": judgement.confusion.labels, "counts": judgement.confusion.counts.tolist()}
    return found


def score_lines(judgement: Judgement) -> list[str]:
    """The scores and their intervals, a line each, the main one first."""
    width = max(map(len, judgement.scores))
    lines = []
    for name in _main_first(judgement):
        value, low, high = _numbers(judgement.scores[name])
        lines.append(f"{name:{width}}  {value:>9}   95 % interval {low} to {high}")
    return lines


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _score_json(score: Score) -> dict[str, Any]:
    return {"value": _finite(score.value), "low": _finite(score.low), "high": _finite(score.high)}


def _finite(value: str | float) -> str | float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Markdown --------------------------------------------------------------------------------------------------------


def _sections(
    judgement: Judgement,
    rows: Sequence[Row],
    answers: Sequence[Answer],
    asked: Sequence[str],
    facts: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
) -> Iterator[str]:
    main, *_ = _numbers(judgement.scores[judgement.main])
    yield f"# {judgement.main} {main} on {judgement.rows:,} rows"
    yield table(("", ""), ((name, excerpt(_shown(fact), CHARACTERS)) for name, fact in facts.items()))
    yield "## Scores"
    yield table(("score", "value", "95 % interval"), _score_rows(judgement))
    yield f"The intervals are over the choice of rows: {RESAMPLES:,} resamples of them with replacement (bootstrap)."
    for each in judgement.tables:
        yield f"## {each.title}"
        cells = ([excerpt(c, CHARACTERS) if isinstance(c, str) else number(c) for c in row] for row in each.rows)
        yield table(each.columns, cells)
    if judgement.confusion is not None:
        yield from _confusion(judgement.confusion)
    if rows:
        yield from _mistakes(rows, answers, asked)
    if settings:
        import yaml

        yield "## Settings"
        yield "~~~~yaml\n" + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).rstrip() + "\n~~~~"


def _score_rows(judgement: Judgement) -> Iterator[list[str]]:
    for name in _main_first(judgement):
        value, low, high = _numbers(judgement.scores[name])
        yield [f"**{name}**" if name == judgement.main else name, value, f"{low} to {high}"]


def _main_first(judgement: Judgement) -> list[str]:
    return sorted(judgement.scores, key=lambda name: name != judgement.main)


def _numbers(score: Score) -> tuple[str, str, str]:
    return number(score.value), number(score.low), number(score.high)


def _confusion(confusion: Confusion) -> Iterator[str]:
    yield "## Confusions"
    yield f"![Which classes are taken for which]({picture.FILE})"
    wrong = confusion.counts * ~np.eye(len(confusion.labels), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    places = [divmod(int(place), len(confusion.labels)) for place in order if wrong.flat[place]]
    if places:
        names = [excerpt(label, CHARACTERS) for label in confusion.labels]
        rows = (
            (names[i], names[j], number(int(wrong[i, j])), number(int(confusion.counts[i].sum()))) for i, j in places
        )
        yield table(("label", "predicted", "rows", "of"), rows)


def _mistakes(rows: Sequence[Row], answers: Sequence[Answer], asked: Sequence[str]) -> Iterator[str]:
    kind, found = mistakes(rows, answers)
    yield f"## {kind.title}"
    if not found:
        yield "There is no mistake."
        return
    yield f"{min(MISTAKES, len(found)):,} of {len(found):,}. A row's number is that of its line in {PREDICTIONS}."
    columns = [name for name in asked if any(name in row for row in rows)]
    yield table(
        ("row", kind.measure, *columns, "right", "predicted"),
        (
            (
                number(each.row + 1),
                number(each.measure),
                *(excerpt(_shown(rows[each.row].get(name, "")), CHARACTERS) for name in columns),
                excerpt(each.right, CHARACTERS),
                excerpt(each.given, CHARACTERS),
            )
            for each in found[:MISTAKES]
        ),
    )


def _shown(value: Any) -> str:
    """What a column or a fact holds, as text: words and names in a row, messages as who says what."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        if all(isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in value):
            return " / ".join(f"{each['role']}: {each['content']}" for each in value)
        return (" " if all(isinstance(each, str) for each in value) else ", ").join(map(_shown, value))
    return str(value)
