"""Transformers' own model tests, on our attention: whatever passes on PyTorch's SDPA must pass on ours.

The tests come with the source distribution of the installed version, fetched here into a temporary folder (and nothing
of it is kept). Three modules that its tests import are not in the distribution and are stubs. What fails for that
reason, or because a test wants more of a model than our tiny ones have, fails on PyTorch's SDPA too: the suite runs
twice, and what ours fails alone is ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import transformers

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


@pytest.fixture(scope="session")
def suite(tmp_path_factory) -> Path:
    """A folder in which `pytest tests/test_models.py` runs Transformers' tests over our models."""
    folder = tmp_path_factory.mktemp("transformers")
    package = f"transformers=={transformers.__version__}"
    pip("download", "--no-deps", "--no-binary", "transformers", package, "--dest", str(folder))
    pip("install", "--no-deps", "--target", str(folder / "libraries"), "parameterized")
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as files:
        wanted = [m for m in files.getmembers() if m.name.split("/")[1:2] == ["tests"]]
        files.extractall(folder, members=wanted, filter="data")
    shutil.move(next(folder.glob("transformers-*/tests")), folder / "tests")
    for name, text in STUBS.items():
        stub = folder / "tests" / name
        stub.parent.mkdir(exist_ok=True)
        (stub.parent / "__init__.py").touch()
        stub.write_text(text)
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    generate\n    training_ci\n")
    shutil.copy(HERE / "models.py", folder / "tests" / "test_models.py")
    return folder


def outcomes(suite: Path, attention: str, family: str) -> dict[str, str]:
    """Test -> passed, skipped or failed."""
    report = suite / f"{attention}-{family}.xml"
    environment = os.environ | {
        "ATTENTION": attention, "CALLS": str(suite / f"calls-{family}"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(suite), str(suite / "libraries")]),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", f"tests/test_models.py::{family}", "-q", "-p", "no:cacheprovider",
        f"--junitxml={report}", "--disable-warnings", "--tb=line",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    found = {}
    for case in xml.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        name = case.get("name", "")
        found[name] = "failed" if failed or found.get(name) == "failed" else "skipped" if skipped else "passed"
    return found


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["Bert", "Gpt2", "Llama", "Bart", "T5", "ModernBert"])
def test_what_passes_on_sdpa_passes_on_ours(suite, family, record_property):
    ours, theirs = (outcomes(suite, attention, family) for attention in ("llmengine", "sdpa"))
    counts = {name: list(found.values()) for name, found in (("ours", ours), ("theirs", theirs))}
    calls = int((suite / f"calls-{family}").read_text())
    for name, values in counts.items():
        line = ", ".join(f"{values.count(outcome)} {outcome}" for outcome in ("passed", "skipped", "failed"))
        print(f"{family}, {name}: {line}" + (f", {calls} calls of our attention" if name == "ours" else ""))
    print("failed on both:", sorted(n for n in ours if ours[n] == theirs.get(n) == "failed"))
    worse = {n: outcome for n, outcome in ours.items() if outcome != theirs.get(n) and outcome != "passed"}
    assert not worse
    assert ours.keys() == theirs.keys() and counts["ours"].count("passed") > 50 and calls > 100
