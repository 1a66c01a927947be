"""The program as a whole: help, start-up, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llmengine
from llmengine.cli import app
from llmengine.cli.common import program
from tests.cli.conftest import call, succeed

COMMANDS = [
    "train", "finetune", "tokenize", "evaluate", "predict", "generate", "fill", "inspect", "convert", "verify",
    "bench", "tune", "info",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


def test_the_module_is_the_program():
    done = python("-m", "llmengine", "--version", check=True)
    assert done.stdout == f"llmengine {llmengine.__version__}\n"
    done = python("-m", "llmengine", "generate", "nowhere", "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere does not exist") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("called", "found", "told"),
    [
        ("/usr/bin/llmengine", "/usr/bin/llmengine", "llmengine"),
        (".venv/bin/llmengine", None, ".venv/bin/llmengine"),  # as the Makefile calls it
        ("/somewhere/llmengine/__main__.py", "/usr/bin/llmengine", "python -m llmengine"),
    ],
)
def test_commands_that_are_told_can_be_called(monkeypatch, called, found, told):
    monkeypatch.setattr(sys, "argv", [called, "train"])
    monkeypatch.setattr("shutil.which", lambda name: found)
    assert program() == told


def test_help_needs_no_pytorch():
    script = (
        "import sys; from llmengine.cli import app; print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert python("-c", script, check=True).stdout == "[]\n"


def test_every_command_has_help_with_an_example():
    names = [command.name for command in app.registered_commands]
    assert names == COMMANDS
    overview = succeed("--help")
    for name in names:
        assert f"\n  {name} " in overview
        text = succeed(name, "--help")
        assert f"  llmengine {name}" in text.partition("Examples:")[2]


@pytest.mark.parametrize(
    "arguments, sentences",
    [
        (["train"], ["config file", "--corpus", "--objective"]),
        (["train", "--corpus", "austen"], ["--objective is missing"]),
        (
            ["train", "--corpus", "austen", "--objective", "plm"],
            ['objective "plm" has no model of its own', "encoder, by --preset"],
        ),
        (["train", "no.yaml"], ["no.yaml: no such config file"]),
        (["train", "no.json"], [".yaml", ".toml"]),
        (["train", "CONFIG", "--set", "optimizer.lr"], ["'optimizer.lr' is not section.field=value"]),
        (["train", "CONFIG", "--set", "optimizer.rate=1"], ["optimizer.rate"]),
        (["train", "CONFIG", "--set", "optimizer.lr=-1.0"], ["optimizer.lr", "-1.0"]),
        (["train", "CONFIG", "--preset", "gpt-9"], ["'gpt-9' is not a preset", "gpt-mini"]),
        (["train", "CONFIG", "--objective", "nsp"], ["objective", "'bert'"]),
        (["train", "CONFIG", "--corpus", "nothere"], ["corpus: nothere does not exist", "*.txt"]),
        (["train", "CONFIG", "--set", "device=tpu9"], ["device", "'tpu9'", "auto, cpu"]),
        (["train", "CONFIG", "--output", "RUN"], ["not empty", "resume"]),
        (["train", "CONFIG", "--resume", "RUN"], ["leave out a config file"]),
        (["train", "--resume", "RUN", "--output", "elsewhere"], ["leave out --output"]),
        (["train", "--resume", "nowhere"], ["nowhere is no run folder", "config.yaml"]),
        (["train", "--resume", "RUN", "--set", "optimizer.lr=0.5"], ["optimizer.lr is 0.5, was"]),
        (["generate", "nowhere", "--prompt", "x"], ["nowhere does not exist"]),
        (["generate", "TESTS", "--prompt", "x"], ["neither config.yaml"]),
        (["generate", "RUN", "--prompt", ""], ["the prompt is empty"]),
        (["generate", "RUN", "--prompt", "so " * 100], ["tokens; the model reads 63"]),
        (["generate", "RUN", "--prompt", "x", "--new-tokens", "900"], ["900", "max_positions"]),
        (["generate", "RUN", "--prompt", "x", "--temperature", "0"], ["temperature is 0", "above 0"]),
        (["generate", "RUN", "--prompt", "x", "--greedy", "--samples", "2"], ["are drawn; --greedy"]),
        (["generate", "BERT", "--prompt", "x"], ["needs a decoder"]),
        (["fill", "BERT", "She was happy."], ["the text has no [MASK]"]),
        (["fill", "BERT", "[MASK]" + " so" * 99], ["tokens; the model reads 64"]),
        (["fill", "RUN", "She was [MASK]."], ["no mask, cls and sep tokens"]),
        (["evaluate", "RUN/model"], ["give its run folder"]),
        (["evaluate", "RUN", "--corpus", "TESTS/cli/conftest.py"], ["conftest.py is not a kind of file"]),
        (["inspect", "TESTS"], ["is no run folder"]),
        (["convert", "nowhere", "RUN"], ["exists already", "--force"]),
        (["convert", "nowhere", "new"], ["nowhere is not a directory"]),
        (["convert", "RUN", "new", "--dtype", "int8"], ["--dtype 'int8' is not one of float32, bfloat16"]),
        (["convert", "RUN", "new", "--family", "gpt9"], ["family", "'gpt9'"]),
        (["convert", "RUN", "new", "--family", "llama"], ['family "llama" cannot express', 'set family to "custom"']),
        (["verify", "RUN", "BERT"], ["architecture is 'decoder' in the first model and 'encoder' in the second"]),
        (["verify", "RUN", "RUN", "--text", ""], ["--text gives no tokens"]),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_errors_are_sentences_with_exit_code_2(arguments: list[str], sentences: list[str], runs, configs):
    places = {"CONFIG": configs["clm"], "RUN": runs["clm"].path, "BERT": runs["bert"].path, "TESTS": ROOT / "tests"}
    for name, path in places.items():
        arguments = [str(path) + a.removeprefix(name) if a.split("/")[0] == name else a for a in arguments]
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") <= 2
    for sentence in sentences:
        assert sentence in result.stderr


@pytest.mark.parametrize(
    "arguments", [["train", "--step", "3"], ["tarin"], ["fill"], ["generate", "x", "--samples", "0"]]
)
def test_wrong_usage_has_exit_code_2(arguments: list[str]):
    result = call(*arguments)
    assert result.exit_code == 2 and "--help" in result.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    result = call("train", "no.yaml", "--debug")
    assert isinstance(result.exception, FileNotFoundError)
    monkeypatch.setenv("LLMENGINE_DEBUG", "1")
    assert isinstance(call("train", "no.yaml").exception, FileNotFoundError)


def test_a_failure_that_the_user_cannot_mend_has_exit_code_1(runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMENGINE_BACKEND", "cuda")
    result = call("fill", runs["bert"].path, "She was [MASK].")
    assert result.exit_code == 1
    assert "RuntimeError" in result.stderr and "'cuda' was demanded" in result.stderr and "--debug" in result.stderr
