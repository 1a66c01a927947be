"""Two finished runs of tiny models, made once by the program itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner, Result

from llmengine.cli import app
from llmengine.data import read_documents

MODEL = {"n_layers": 2, "n_heads": 2, "d_model": 32, "d_ff": 64, "max_positions": 64}


def call(*arguments: object) -> Result:
    """Runs the program; its exit code, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i, novel in enumerate(read_documents("austen")[:3]):
        (folder / f"{i}.txt").write_text(novel[1000:9000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def configs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    paths = {}
    for objective, preset in (("bert", "bert-tiny"), ("clm", "gpt-tiny")):
        fields = {
            "corpus": str(corpus),
            "objective": objective,
            "steps": 4,
            "tokenizer": {"vocab_size": 400},
            "model": {"preset": preset, **MODEL},
            "data": {"sequence_length": 32, "batch_tokens": 128, "held_out": 0.2},
            "schedule": {"kind": "constant"},
            "every": {"evaluate": 2, "save": 2},
        }
        paths[objective] = folder / f"{objective}.yaml"
        paths[objective].write_text(yaml.safe_dump(fields), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def runs(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """For "bert" and "clm": the run folder, and what the program printed."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        objective: SimpleNamespace(
            path=folder / objective, printed=succeed("train", config, "--output", folder / objective)
        )
        for objective, config in configs.items()
    }
