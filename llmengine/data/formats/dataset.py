"""Rows of a Hugging Face `datasets.Dataset`, or of anything that has its column_names and iterates over dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmengine.data.formats.faults import Faults, Placed

UNTOLD = -1


def is_dataset(source: object) -> bool:
    return hasattr(source, "column_names") and hasattr(source, "__iter__")


def read_dataset(dataset: Any, faults: Faults) -> Iterator[Placed]:
    """Its rows; the numbers of a ClassLabel, also in lists, become the names of their classes, and -1, which stands
    there for a label that is not told (of test data, say), becomes None."""
    if isinstance(dataset.column_names, Mapping):
        raise ValueError(f"data: a data set of several parts; give one of them: {', '.join(dataset.column_names)}")
    features = getattr(dataset, "features", None) or {}
    named = {column: convert for column, feature in features.items() if (convert := _names(feature))}
    for number, row in enumerate(dataset):
        place = f"row {number}"
        try:
            yield place, {column: named[column](v) if column in named else v for column, v in row.items()}
        except ValueError as error:
            faults(place, str(error))


def _names(feature: Any) -> Callable[[Any], Any] | None:
    """From a column's values to names, where its feature is a ClassLabel or a list of them."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if inner is not None and (one := _names(inner)):
        return lambda values: None if values is None else [one(value) for value in values]
    names = getattr(feature, "names", None)
    if not isinstance(names, list):
        return None

    def name(value: Any) -> str | None:
        if value is None or value == UNTOLD:
            return None
        if not 0 <= value < len(names):
            raise ValueError(f"has the label {value}, which none of the {len(names)} classes has")
        return names[value]

    return name
