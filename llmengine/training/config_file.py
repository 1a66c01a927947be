"""Config files: YAML and TOML in, YAML out, and "section.field=value" on top."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmengine.data.textfiles import decode
from llmengine.files import replace_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Loader(yaml.SafeLoader):
    """Safe YAML where 1e-4 is a number, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse(text: str) -> Any:
    # a subclass of SafeLoader: builds plain values only
    return yaml.load(text, Loader=_Loader)


def read(path: Path) -> dict[str, Any]:
    """A file's fields. Raises FileNotFoundError, or ValueError naming file and place."""
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"{path}: a config is a .yaml, .yml or .toml file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        text = decode(path.read_bytes(), 0)
        fields = tomllib.loads(text) if path.suffix == ".toml" else parse(text)
    except (ValueError, yaml.YAMLError) as error:  # TOML's are ValueErrors
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: holds {type(fields).__name__}; expected fields, one a line: name: value")
    return fields


def write(path: Path, fields: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(fields), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    replace_text(path, text)


def overridden(fields: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of fields with each "a.b=value" set; sections that are missing appear."""
    fields = {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
    for override in overrides:
        name, separator, value = override.partition("=")
        path = name.strip().split(".")
        if not separator or not all(path):
            raise ValueError(f"override {override!r} is not section.field=value")
        place: Any = fields
        for i, part in enumerate(path[:-1]):
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"override {override!r}: {'.'.join(path[: i + 1])} is {place!r}, not a section")
        try:
            place[path[-1]] = parse(value)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not YAML: {error}") from None
    return fields


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    return dict(_flat(fields, prefix))


def _flat(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
