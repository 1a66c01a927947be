"""A fine-tuned model by path: a run folder of `finetune`, or a model directory; and the rows that it is asked about."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmengine.models import Transformer
    from llmengine.tasks import Row, Task
    from llmengine.training.finetune_config import FinetuneConfig

Data = Annotated[
    list[str] | None, typer.Option("--data", metavar="FILE", help="Rows: JSON lines, CSV, CoNLL, … May be repeated.")
]
DataKind = Annotated[str | None, typer.Option("--kind", help="The format of the files. Default: by their names.")]
DataFormat = Annotated[
    list[str] | None,
    typer.Option(
        "--format", metavar="NAME=VALUE", help="An option of the format: delimiter=; scheme=iob1. May be repeated."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME=THEIRS", help="What the files call a column: text=sentence. May be repeated."
    ),
]


@dataclass(frozen=True)
class FineTuned:
    model: Transformer
    task: Task
    config: FinetuneConfig | None
    """The run's; None for a model directory."""
    source: Path
    """Where the weights come from."""

    @property
    def columns(self) -> dict[str, Any]:
        """What the run's own files call its columns."""
        return {} if self.config is None else dict(self.config.columns)

    def format(self, files: Sequence[str], kind: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """How files are written: as the run's own where nobody says otherwise and they are named as those are."""
        own = {} if self.config is None else self.config.format
        if kind is None and _suffixes(files) <= _suffixes(self._files):
            return {**own, **options}
        if kind is None or kind != own.get("kind"):
            own = {} if kind is None else {"kind": kind}
        return {**own, **options}

    @property
    def _files(self) -> list[str]:
        """The run's."""
        if self.config is None:
            return []
        given = (self.config.train, self.config.validation, self.config.test)
        several = (each if isinstance(each, list) else [each] for each in given)
        return [file for each in several for file in each if isinstance(file, str)]


def check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder, or a model directory")


def is_fine_tuned(path: Path) -> bool:
    """Whether there is a task beside the model."""
    from llmengine.tasks import FILE
    from llmengine.training.run import Folder

    return any((directory / FILE).is_file() for directory in (path, Folder(path).model))


def load(path: Path, device: str = "auto") -> FineTuned:
    """Raises FileNotFoundError or ValueError saying what is missing and what to do."""
    from llmengine import tasks
    from llmengine.data import Tokenizer
    from llmengine.models import Transformer
    from llmengine.tasks.preference import Preferences
    from llmengine.training import FinetuneConfig
    from llmengine.training.run import Folder, model_directory, pick_device

    check_exists(path)
    if not is_fine_tuned(path):
        raise FileNotFoundError(
            f"{path} has no {tasks.FILE}: it is no fine-tuned model; give a run folder of `finetune`, or its model"
        )
    directory, file = model_directory(path), Folder(path).config
    config = FinetuneConfig.from_file(file) if file.is_file() else None
    task = tasks.load(directory, Tokenizer.load(directory))
    model = Transformer.from_pretrained(directory).to(pick_device(device)).eval()
    if config is not None and isinstance(task, Preferences) and task.loss.needs_reference:
        origin = _origin(config, task)
        if origin is not None:
            task.compare_with(origin.to(pick_device(device)))
    return FineTuned(model, task, config, directory)


def _origin(config: FinetuneConfig, task: Task) -> Transformer | None:
    """The model that a run began with; None: it is gone, or was made for the run."""
    from llmengine.models import Transformer
    from llmengine.training.run import model_directory

    if not isinstance(config.model, str) or not Path(config.model).exists():
        return None
    return Transformer.from_pretrained(model_directory(config.model), objectives=[task.objective], **config.fields)


# ---- rows ------------------------------------------------------------------------------------------------------------


def read(files: Sequence[str], format: Mapping[str, Any], columns: Mapping[str, str | int]) -> Sequence[Row]:
    from llmengine.data.rows import read_rows

    return read_rows(files, columns=columns or None, **format)


def _suffixes(files: Sequence[str]) -> set[str]:
    from llmengine.data.textfiles import without_compression

    return {Path(without_compression(Path(file))).suffix.lower() for file in files}


def format_of(given: Sequence[str] | None) -> dict[str, Any]:
    """--format: values as YAML has them."""
    from llmengine.training.config_file import overridden

    return overridden({}, given or ())


def columns_of(given: Sequence[str] | None) -> dict[str, str]:
    """--column."""
    columns = {}
    for each in given or ():
        name, _, theirs = each.partition("=")
        if not (name and theirs):
            raise ValueError(f"--column {each!r}: write NAME=THEIRS, as text=sentence")
        columns[name] = theirs
    return columns


def held_out(tuned: FineTuned) -> tuple[Sequence[Row], list[str]]:
    """The rows that the run is tested with, or evaluated on; and the files that they are from."""
    from llmengine.training.finetune_data import TrainingRows, read_source
    from llmengine.training.report import shown

    config = tuned.config
    if config is None:
        raise ValueError(f"{tuned.source} is a model directory and knows no rows; give them: --data FILE")
    for source in (config.test, config.validation):
        if isinstance(source, str | list):
            return read_source(config, source, warnings.warn), [source] if isinstance(source, str) else source
    rows = TrainingRows.read(config, warnings.warn).held_out
    if not rows:
        raise ValueError("the run held out nothing (validation: 0); give rows: --data FILE")
    train = [config.train] if isinstance(config.train, str) else config.train
    return rows, [f"{config.validation:g} of {', '.join(map(shown, train))}, held out"]


def question(task: Task, text: str, pair: str | None = None) -> Row:
    """A row that asks about a text, or about two that belong together.

    pair: what the task's second question is: text_pair, context. Words are the text's, cut at white space.
    """
    if "messages" in task.asked:
        row: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    else:
        first = task.asked[0]
        row = {first: text.split() if first == "words" else text}
    second = next((name for name in task.asked[1:] if name in ("text_pair", "context")), None)
    if pair is not None:
        if second is None:
            raise ValueError(f"--pair: task {task.name!r} asks for {', '.join(task.asked)} alone")
        row[second] = pair
    if missing := [name for name in task.asked if name not in row and name != "text_pair"]:
        hint = f"give --pair, the {missing[0]}" if missing == [second] else "give rows: --data FILE"
        raise ValueError(f"--text: task {task.name!r} also asks for {', '.join(missing)}; {hint}")
    return row


def asking(task: Task, row: Row) -> Row:
    """A row as it is; where it has a text and not the column that the task asks for, the question that the text is."""
    from llmengine.data.rows import PlacedRow

    if "text" not in row or task.asked[0] in row:
        return row
    columns = {**row, **question(task, row["text"])}
    return PlacedRow(row.place, columns) if isinstance(row, PlacedRow) else columns
