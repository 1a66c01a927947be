"""The functions of csrc/cuda/ptx/ compile for every architecture to the instructions that they are named for. Nothing
here runs on a GPU; what the instructions do is tests/sim/test_layouts.py's.
"""

from __future__ import annotations

import functools
import re
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
BOXES = [
    *(f"cp.async.bulk.tensor.{n}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [" for n in range(1, 6)),
    *(f"cp.async.bulk.tensor.{n}d.global.shared::cta.tile.bulk_group [" for n in range(1, 6)),
    *(f"cp.reduce.async.bulk.tensor.{n}d.global.shared::cta.add.tile.bulk_group [" for n in range(1, 6)),
    "cp.async.bulk.global.shared::cta.bulk_group [", "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [",
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [",
    "cp.async.bulk.commit_group", "cp.async.bulk.wait_group 0", "cp.async.bulk.wait_group.read 0", "prefetch.tensormap",
    "fence.proxy.async;", "fence.proxy.async.shared::cta",
]  # fmt: skip
CLUSTERS = [
    "%cluster_ctarank", "%cluster_nctarank", "barrier.cluster.arrive.release", "barrier.cluster.arrive.relaxed",
    "barrier.cluster.wait.acquire", "mapa.shared::cluster.u32", "ld.shared::cluster.u32", "ld.shared::cluster.v4.u32",
    "st.shared::cluster.u32", "st.shared::cluster.v4.u32", "mbarrier.arrive.release.cluster.shared::cluster.b64",
    "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64", "mbarrier.expect_tx.relaxed.cta.shared::cta.b64",
    "cp.async.mbarrier.arrive.noinc.shared::cta.b64", "cp.async.mbarrier.arrive.shared::cta.b64", "elect.sync",
]  # fmt: skip
WGMMA = [  # of sm_90a alone
    "setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32", "wgmma.fence.sync.aligned",
    "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned",
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16",
    "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32", "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3",
    "wgmma.mma_async.sync.aligned.m64n64k32.f32.e5m2.e4m3",
]  # fmt: skip
# In the machine code of sm_90a: the instruction and how many of them there must be at least.
MACHINE = {
    r"UTMALDG\.2D\.MULTICAST": 1, r"UTMALDG\.[1-5]D ": 5, r"UTMASTG\.[1-5]D ": 5, r"UTMACCTL\.PF": 1,
    r"UTMAREDG\.[1-5]D\.ADD": 5, r"UBLKRED": 1,
    r"SYNCS\.": 10, r"HGMMA\.64x64x16\.F32 ": 6, r"HGMMA\.64x64x16\.F32\.BF16": 6, r"HGMMA\.64x64x8\.F32\.TF32": 2,
    r"QGMMA\.64x64x32\.F32\.E4M3\.E4M3": 1, r"QGMMA\.64x64x32\.F32\.E5M2\.E4M3": 1,
    r"HGMMA\.64x256x16": 2, r"HGMMA.*gdesc\[\w+\]\.tnspA\.tnspB": 2, r"USETMAXREG": 2, r"UCGABAR_ARV": 2,
    r"\bELECT\b": 2, r"ARRIVES\.LDGSTSBAR": 2,
}  # fmt: skip
COPIES = ["cp.async.cg.shared.global", "cp.async.ca.shared.global", "cp.async.commit_group", "cp.async.wait_group"]


@functools.cache
def ptx(architecture: str, folder: Path, file: str = "tests/sim/layouts.cu") -> str:
    """Of a file that uses each function; assembled too, as ptxas knows what an architecture has."""
    source = ROOT / file
    code = folder / f"{source.stem}_{architecture}.ptx"
    front = [f"-arch=compute_{architecture}", "-ptx", f"-I{ROOT / 'csrc'}", str(source), "-o", str(code)]
    compiler = resources.nvcc() or ""
    subprocess.run([compiler, *resources.FLAGS, *front], check=True, capture_output=True, text=True)
    assembler = shutil.which("ptxas") or str(Path(compiler).resolve().parent / "ptxas")
    subprocess.run([assembler, f"-arch=sm_{architecture}", code, "-o", code.with_suffix(".cubin")], check=True)
    return code.read_text()


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_each_function_is_its_instruction(architecture: str, tmp_path_factory):
    code = ptx(architecture, tmp_path_factory.getbasetemp())
    for instruction in [*LOADS, *PRODUCTS, *COPIES, "cvt.rna.tf32.f32"]:
        assert instruction in code, instruction
    for instruction in [*STORES, *MBARRIERS]:
        assert (instruction in code) == (architecture != "80"), instruction


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_each_function_of_hopper_is_its_instruction(architecture: str, tmp_path_factory):
    code = ptx(architecture, tmp_path_factory.getbasetemp(), "tests/sim/hopper_layouts.cu")
    for instruction in [*BOXES, *CLUSTERS]:
        assert (instruction in code) == (architecture != "80"), instruction
    for instruction in WGMMA:
        assert (instruction in code) == (architecture == "90a"), instruction


@pytest.mark.skipif(resources.cuobjdump() is None, reason="needs cuobjdump, of the CUDA toolkit or Triton's wheel")
def test_machine_code_of_hopper_has_its_instructions(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    ptx("90a", folder, "tests/sim/hopper_layouts.cu")
    cubin = folder / "hopper_layouts_90a.cubin"
    disassembler = resources.cuobjdump() or ""
    code = subprocess.run([disassembler, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    for instruction, count in MACHINE.items():
        assert len(re.findall(instruction, code)) >= count, instruction


def test_products_of_every_width_name_all_their_accumulators(tmp_path_factory):
    code = ptx("90a", tmp_path_factory.getbasetemp(), "tests/cuda/wgmma_widths.cu")
    for n in range(8, 257, 8):
        for types in ("bf16.bf16", "f16.f16"):
            (found,) = re.findall(rf"wgmma\.mma_async\.sync\.aligned\.m64n{n}k16\.f32\.{types} \{{([^}}]*)\}}", code)
            assert len(set(found.split(","))) == n // 2, (n, types)
