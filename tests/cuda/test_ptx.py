"""The functions of csrc/cuda/ptx/ compile for every architecture to the instructions that they are named for. Nothing
here runs on a GPU; what the instructions do is tests/sim/test_layouts.py's.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from llmengine.testing import resources

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(resources.nvcc() is None, reason="needs nvcc, which cross-compiles without a GPU"),
    pytest.mark.timeout(600),
]

LOADS = [f"ldmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16" for n in (1, 2, 4) for t in ("", ".trans")]
STORES = [f"stmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16" for n in (2, 4) for t in ("", ".trans")]
PRODUCTS = [
    f"mma.sync.aligned.{shape}.row.col.f32.{t}.{t}.f32"
    for shape, types in (("m16n8k16", ("bf16", "f16")), ("m16n8k8", ("bf16", "f16", "tf32")))
    for t in types
]
MBARRIERS = [
    "mbarrier.init.shared::cta.b64", "fence.mbarrier_init.release.cluster", "mbarrier.arrive.shared::cta.b64",
    "mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.try_wait.parity.shared::cta.b64",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
]  # fmt: skip
COPIES = ["cp.async.cg.shared.global", "cp.async.ca.shared.global", "cp.async.commit_group", "cp.async.wait_group"]


@functools.cache
def ptx(architecture: str, folder: Path) -> str:
    """Of tests/sim/layouts.cu, which uses each function; assembled too, as ptxas knows what an architecture has."""
    source, code = ROOT / "tests/sim/layouts.cu", folder / f"{architecture}.ptx"
    front = [f"-arch=compute_{architecture}", "-ptx", f"-I{ROOT / 'csrc'}", str(source), "-o", str(code)]
    compiler = resources.nvcc() or ""
    subprocess.run([compiler, *resources.FLAGS, *front], check=True, capture_output=True, text=True)
    assembler = shutil.which("ptxas") or str(Path(compiler).resolve().parent / "ptxas")
    subprocess.run([assembler, f"-arch=sm_{architecture}", code, "-o", folder / "cubin"], check=True)
    return code.read_text()


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_each_function_is_its_instruction(architecture: str, tmp_path_factory):
    code = ptx(architecture, tmp_path_factory.getbasetemp())
    for instruction in [*LOADS, *PRODUCTS, *COPIES, "cvt.rna.tf32.f32"]:
        assert instruction in code, instruction
    for instruction in [*STORES, *MBARRIERS]:
        assert (instruction in code) == (architecture != "80"), instruction
