"""pydantic's errors as sentences: the field's path, what was given, what is allowed, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def hint(given: object, allowed: Iterable[str]) -> str:
    """ "; did you mean x?" where one of the allowed words is close to the given one, else nothing."""
    close = difflib.get_close_matches(str(given), list(allowed), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def sentences(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """One sentence per wrong field of `model`; a field that admits several types has one, of the closest type."""
    seen = set()
    for item in error.errors():
        path = _path(item["loc"], model)
        if path not in seen or not path:
            seen.add(path)
            yield _sentence(path, item, model)


def _sentence(path: str, error: Mapping[str, Any], model: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden":
        section, _, name = path.rpartition(".")
        fields = _fields(section, model)
        return f"{path} is not a field{hint(name, fields)}; fields{' of ' + section if section else ''}: " + ", ".join(
            fields
        )
    if error["type"] == "missing":
        return f"{path} is required"
    if error["type"] == "value_error":  # our own sentence
        return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    given = error["input"]
    expected = error["msg"].replace("Input should be", "must be")
    words = re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))
    return f"{path}: {expected}, got {given!r}{hint(given, words)}"


def _path(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The dotted name: pydantic's place without the names of a union's alternatives."""
    return ".".join(str(part) for part in loc if not isinstance(part, str) or re.fullmatch(r"(?!str$|int$)\w+", part))


def _fields(section: str, model: type[BaseModel]) -> list[str]:
    for name in filter(None, section.split(".")):
        annotation = model.model_fields[name].annotation
        # a section that may be left out is a union with None
        alternatives = get_args(annotation) or (annotation,)
        model = next(inner for inner in alternatives if isinstance(inner, type) and issubclass(inner, BaseModel))
    return list(model.model_fields)
