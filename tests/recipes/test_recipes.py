"""Recipes of examples/recipes: the configs are valid, data are split as said; on demand, scores.

`pytest -m recipes` runs all of them from nothing to a test score: packages are installed, half an hour passes.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmengine.training import FinetuneConfig, RunConfig

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "recipes"
sys.path.insert(0, str(FOLDER))  # as for a script there
spec = importlib.util.spec_from_file_location("recipes_run", FOLDER / "run.py")
assert spec is not None and spec.loader is not None
run = importlib.util.module_from_spec(spec)
sys.modules["recipes_run"] = run
spec.loader.exec_module(run)
sources = run.sources


@pytest.mark.parametrize("name", run.RECIPES)
def test_configs_are_valid_and_fit_each_other(name):
    recipe, config = run.RECIPES[name], FinetuneConfig.from_file(FOLDER / f"{name}.yaml")
    assert config.test is not None
    if recipe.starts_from == "minilm":
        return
    before = RunConfig.from_file(FOLDER / f"{recipe.starts_from}.yaml")
    assert config.model == f"runs/recipes/{recipe.starts_from}"
    assert before.corpus == f"runs/recipes/data/{run.CORPORA[recipe.starts_from]}/train.jsonl"
    assert name in sources.SOURCES and run.CORPORA[recipe.starts_from] in sources.SOURCES


def test_every_config_is_of_a_recipe():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {*run.RECIPES, *run.CORPORA}


def test_rows_of_one_key_are_in_one_split_and_none_twice():
    made = [(f"key {i % 500}", {"text": f"text {i % 1500}"}) for i in range(3000)]
    parts = sources.split(made)
    texts = {part: {row["text"] for row in rows} for part, rows in parts.items()}
    assert sum(map(len, parts.values())) == 1500 == sum(map(len, texts.values()))
    keys = {part: {int(text.split()[1]) % 500 for text in found} for part, found in texts.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert 0.06 < len(keys["test"]) / 500 < 0.14


def test_translations_are_of_the_same_keys_and_a_part_is_in_one_split(tmp_path, monkeypatch):
    texts = {
        "lamp/translations/en.json": {"title": "A lamp", "step": {"on": "Turn  on", "name": "Wi-Fi"}, "left": "Left"},
        "lamp/translations/de.json": {"title": "Eine Lampe", "step": {"on": "Einschalten", "name": "Wi-Fi"}},
        "lamp/translations/sensor.en.json": {"state": "bright"},
        "lamp/translations/sensor.de.json": {"state": "hell"},
        "plug/translations/en.json": {"title": "A plug", "step": {"on": "Turn on"}},
        "plug/translations/de.json": {"title": "Ein Stecker", "step": {"on": "Anschalten"}},
        "door/translations/en.json": {"title": "A door"},  # nobody translated it
    }
    for path, content in texts.items():
        file = tmp_path / "components" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(sources, "package", lambda name: tmp_path)
    pairs = [("A lamp", "Eine Lampe"), ("Turn on", "Einschalten"), ("bright", "hell"), ("A plug", "Ein Stecker")]
    rows = [{"source": source, "target": target} for source, target in pairs]
    assert list(sources.translations()) == list(zip(["lamp"] * 3 + ["plug"], rows, strict=True))
    assert [row["text"] for _, row in sources.phrases()] == [text for pair in pairs for text in pair]


def test_corrections_are_pairs_of_sentences(tmp_path, monkeypatch):
    rules = tmp_path / "data" / "en" / "rules"
    rules.mkdir(parents=True)
    (rules / "grammar.xml").write_text(
        '<rule><example correction="a lot|lots">There is <marker>alot</marker> &amp; more.</example>'
        '<example>All is well.</example><example correction="">Nothing <marker></marker>to do.</example></rule>'
    )
    monkeypatch.setattr(sources, "package", lambda name: tmp_path)
    row = {"source": "There is alot & more.", "target": "There is a lot & more."}
    assert list(sources.corrections()) == [(row["target"], row)]


def test_a_score_below_the_bound_fails(tmp_path):
    (tmp_path / "intents" / "evaluation").mkdir(parents=True)
    scores = {"scores": {"accuracy": {"value": 0.5}}}
    (tmp_path / "intents" / "evaluation" / "scores.json").write_text(json.dumps(scores))
    command = [sys.executable, FOLDER / "run.py", "intents", "--folder", tmp_path, "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "accuracy 0.5000 does not reach 0.75" in done.stderr


@pytest.mark.recipes
@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", run.RECIPES)
def test_a_recipe_reaches_its_bound(name, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "recipes"  # what is pretrained serves several recipes
    done = subprocess.run([sys.executable, FOLDER / "run.py", name, "--folder", folder, "--check"])
    assert done.returncode == 0
