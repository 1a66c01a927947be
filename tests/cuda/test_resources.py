"""Every CUDA kernel, compiled for every architecture, keeps within budget.json. Nothing here runs on a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmengine.testing import resources

ROOT = Path(__file__).resolve().parents[2]
BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())

pytestmark = [
    pytest.mark.skipif(resources.nvcc() is None, reason="needs nvcc, which cross-compiles without a GPU"),
    pytest.mark.timeout(1200),  # a cold compilation of one file for one architecture takes a minute of an idle core
]


def reported(architecture: str) -> dict[str, dict[str, int]]:
    sources = resources.sources(architecture)
    return {k: v for source in sources for k, v in resources.report(source, architecture).items()}


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_kernels_keep_within_their_budget(architecture: str):
    """A kernel that takes more, or is new, needs a new budget: `python -m llmengine.testing.resources`."""
    taken, allowed = reported(architecture), BUDGET[f"sm_{architecture}"]
    assert taken.keys() == allowed.keys()
    over = {
        name: (taken[name], allowed[name]) for name in taken for k in allowed[name] if taken[name][k] > allowed[name][k]
    }
    assert not over


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_nothing_is_spilled_and_nothing_lies_on_a_stack(architecture: str):
    """Nor does the assembler serialise products of a warpgroup, as it does where registers are touched between them."""
    bad = {n: t for n, t in reported(architecture).items() if t["stack"] or t["spills"] or t["injected_waits"]}
    assert not bad


NEEDS_CUOBJDUMP = pytest.mark.skipif(
    resources.cuobjdump() is None, reason="needs cuobjdump, of the CUDA toolkit or Triton's wheel"
)

# Files and kernels over gemm_sm80.cuh and gemm_sm90a.cuh.
PRODUCTS = ("gemm_sm80", "ffn_sm80", "linear_cross_entropy_sm80")
HOPPER_PRODUCTS = ("gemm_sm90a", "ffn_sm90a", "linear_cross_entropy_sm90a")
PRODUCT_KERNELS = (
    "fp8_product", "gemm_sm80", "gemm_sm90a", "hidden_product", "hidden_gradient", "logits_of_span", "logits_gradient",
)  # fmt: skip
# What they write is a number a row, a column or a block.
FEW_STORES = ("fp8_maxima", "norm_backward_sum", "cross_entropy_forward", "cross_entropy_sum", "gradient_norm_squares")
# What they read is a number a tensor, or a block of one.
NO_ROWS = ("adamw_factors", "gradient_norm_root", "linear_cross_entropy_merge")


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_row_kernels_move_16_bytes_at_a_time(architecture: str):
    for name, taken in reported(architecture).items():
        if name.startswith(("attention_", *PRODUCT_KERNELS, *NO_ROWS)):
            continue  # attention and products: tests below
        assert taken["wide_loads"] > 0, name
        assert taken["wide_stores"] > 0 or name.startswith(FEW_STORES), name


@NEEDS_CUOBJDUMP
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_machine_code_loads_16_bytes_at_a_time(architecture: str):
    for source in resources.sources(architecture):
        if source.stem.startswith("attention_"):
            continue
        for name, loads in resources.instructions(source, architecture, r"\bLDG\.[\w.]*128").items():
            assert loads > 0 or name.startswith((*PRODUCT_KERNELS, *NO_ROWS)), name


@NEEDS_CUOBJDUMP
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_attention_multiplies_on_tensor_cores_and_copies_16_bytes_asynchronously(architecture: str):
    for source in resources.sources(architecture):
        if not source.stem.startswith("attention_sm80"):
            continue
        copies = resources.instructions(source, architecture, r"\bLDGSTS\.[\w.]*128")
        matrices = resources.instructions(source, architecture, r"\bLDSM\.16\.")
        for name, products in resources.instructions(source, architecture, r"\bHMMA\.16816\.F32").items():
            assert products >= 2, name
            if not name.startswith("attention_statistics"):
                assert copies[name] >= 8 and matrices[name] >= 16 and products >= 32, name
            if name.startswith(("attention_forward", "attention_keys", "attention_rows")):
                assert resources.report(source, architecture)[name]["wide_stores"] > 0, name


@NEEDS_CUOBJDUMP
@pytest.mark.parametrize("file", HOPPER_PRODUCTS)
def test_products_of_warpgroups_come_from_boxes_that_both_blocks_of_a_cluster_share(file: str):
    """Four products of 16 a stage of 64; a's own boxes and b's for all; results by panels of 64 columns, or by rows."""
    source = resources.ROOT / f"csrc/cuda/{file}.cu"
    products = resources.instructions(source, "90a", r"\bHGMMA\.64x(?:128|256)x16\.F32")
    own, shared = (resources.instructions(source, "90a", rf"\bUTMALDG\.2D{kind} ") for kind in ("", r"\.MULTICAST"))
    stores = resources.instructions(source, "90a", r"\bUTMASTG\.2D ")
    assert products
    for name in products:
        assert products[name] == 4 and own[name] >= 1 and shared[name] >= 1, name
        if name.startswith("gemm_sm90a_boxes"):
            columns = int(re.findall(r", (128|256),", name)[0])
            assert stores[name] == columns // 64, name
        elif not name.startswith("logits_of_span"):  # which writes three numbers a token
            assert resources.report(source, "90a")[name]["wide_stores"] > 0, name


@NEEDS_CUOBJDUMP
def test_8_bit_floats_are_multiplied_by_warpgroups_and_added_to_sums_of_their_own():
    """Four products of 32 a stage of 128, and then a multiply-add for each of the 64 sums of a thread."""
    source = resources.ROOT / "csrc/cuda/fp8_product_sm90a.cu"
    formats = {"E4m3": r"E4M3\.E4M3", "E5m2": r"E5M2\.E4M3"}
    own, shared = (resources.instructions(source, "90a", rf"\bUTMALDG\.2D{kind} ") for kind in ("", r"\.MULTICAST"))
    sums = resources.instructions(source, "90a", r"\bFFMA ")
    for format, types in formats.items():
        for name, products in resources.instructions(source, "90a", rf"\bQGMMA\.64x128x32\.F32\.{types} ").items():
            assert products == 4 * (format in name), name
            assert own[name] >= 1 and shared[name] >= 1 and sums[name] >= 64, name
            assert resources.report(source, "90a")[name]["wide_stores"] > 0, name
    source = resources.ROOT / "csrc/cuda/fp8_quantise_sm90a.cu"
    for format in formats:
        for name, conversions in resources.instructions(source, "90a", rf"\bF2FP\.SATFINITE\.{format.upper()}").items():
            assert (conversions > 0) == (format in name), name


@NEEDS_CUOBJDUMP
def test_hoppers_attention_multiplies_boxes_by_warpgroups():
    """Scores once before the loop over keys and once in it, 16 of head_dim a product; outputs in it and behind it, 16
    keys a product. Queries, keys and values come by boxes of four dimensions, of 64 columns each."""
    source = resources.ROOT / "csrc/cuda/attention_sm90a_forward.cu"
    products = resources.instructions(source, "90a", r"\bHGMMA\.64x\d+x16\.F32")
    of_values = resources.instructions(source, "90a", r"\bHGMMA\.64x\d+x16\.F32.*tnspB")
    boxes = resources.instructions(source, "90a", r"\bUTMALDG\.4D ")
    assert products
    for name in products:
        dim, value_dim, simple = classes_of(name)
        most = 128 if value_dim <= 128 else 96 if value_dim == 192 else 64
        keys = most if simple or dim <= 96 else most - 16
        assert of_values[name] == 2 * keys // 16, name
        assert products[name] - of_values[name] == 2 * dim // 16, name
        assert boxes[name] == 3 * -(-dim // 64) + -(-value_dim // 64), name
        assert resources.report(source, "90a")[name]["wide_stores"] > 0, name


@NEEDS_CUOBJDUMP
def test_attention_of_8_bits_adds_products_of_128_keys_to_sums_of_its_own():
    """Scores, 32 of head_dim a product; values in parts of at most 128 columns, the last with ones, 32 keys a product,
    and a multiply-add for each sum. Probabilities are rounded in pairs. Tiles come in bulk: queries of both
    warpgroups, keys, values."""
    source = resources.ROOT / "csrc/cuda/attention_fp8_forward_sm90a.cu"
    products = resources.instructions(source, "90a", r"\bQGMMA\.64x\d+x32\.F32\.E4M3\.E4M3 ")
    with_ones = resources.instructions(source, "90a", r"\bQGMMA\.64x(?:72|136)x32\.F32")
    roundings, sums = (resources.instructions(source, "90a", p) for p in (r"\bF2FP\.SATFINITE\.E4M3", r"\bFFMA "))
    copies = resources.instructions(source, "90a", r"\bUBLKCP")
    assert len(products) == 6
    for name in products:
        dim, keys, parts = {64: (64, 128, 1), 128: (128, 128, 1), 256: (256, 64, 2)}[
            int(re.findall(r"(\d+)>", name)[0])
        ]
        assert products[name] == dim // 32 + parts * keys // 32 and with_ones[name] == keys // 32, name
        assert roundings[name] == keys // 4 and sums[name] >= dim // 2 + keys // 2 and copies[name] == 4, name
        assert resources.report(source, "90a")[name]["wide_stores"] > 0, name


PASSING = {  # lines of a tile that passes, by the class of the head dim: of simple kernels and of others
    "rows": {64: (96, 64), 96: (96, 48), 128: (80, 48), 192: (64, 48), 256: (48, 32)},
    "keys": {64: (96, 48), 96: (64, 32), 128: (48, 32)},
    "wide_keys": {192: (64, 64), 256: (64, 64)},
}


@NEEDS_CUOBJDUMP
@pytest.mark.parametrize("owner", PASSING)
def test_hoppers_attention_multiplies_boxes_by_warpgroups_backward(owner: str):
    """Scores and dO V^T, 16 of head_dim a product: for dQ, and where warpgroups own sums of a kind, before the loop and
    in it. Sums, 16 of the lines that pass a product: in the loop and behind it; dK and dV together in the loop. Pairs
    of tiles come by boxes, what is owned and what passes; the statistics of rows that pass by asynchronous copies."""
    source = resources.ROOT / f"csrc/cuda/attention_sm90a_{owner}.cu"
    products = resources.instructions(source, "90a", r"\bHGMMA\.64x\d+x16\.F32")
    of_sums = resources.instructions(source, "90a", r"\bHGMMA\.64x\d+x16\.F32.*tnspB")
    boxes = resources.instructions(source, "90a", r"\bUTMALDG\.4D ")
    copies = resources.instructions(source, "90a", r"\bLDGSTS\.E")
    assert len(products) == {"rows": 24, "keys": 12, "wide_keys": 12}[owner]
    for name in products:
        dim, value_dim, simple = classes_of(name)
        passing = PASSING[owner][dim][0 if simple else 1]
        assert of_sums[name] == (4 if owner == "wide_keys" else 2) * passing // 16, name
        assert products[name] - of_sums[name] == (1 if owner == "keys" else 2) * (dim + value_dim) // 16, name
        assert boxes[name] == 2 * (-(-dim // 64) + -(-value_dim // 64)), name
        assert (copies[name] > 0) == (owner != "rows"), name
        assert resources.report(source, "90a")[name]["wide_stores"] > 0, name


@NEEDS_CUOBJDUMP
def test_hoppers_attention_makes_all_gradients_in_one_pass_by_warpgroups():
    """In the loop over rows: scores, once before it and once at its end, and dO V^T, 16 of head_dim a product; dK and
    dV, 16 rows a product; dQ, 16 of a block's 128 keys. Pairs of tiles come by boxes, what is known of rows in bulk;
    in bulk parts of dQ are added."""
    source = resources.ROOT / "csrc/cuda/attention_sm90a_one_pass.cu"
    products = resources.instructions(source, "90a", r"\bHGMMA\.64x\d+x16\.F32")
    boxes = resources.instructions(source, "90a", r"\bUTMALDG\.4D ")
    copies = resources.instructions(source, "90a", r"\bUBLKCP")
    sums = resources.instructions(source, "90a", r"\bUBLKRED")
    assert len(products) == 12
    for name in products:
        dim, _, simple = classes_of(name)
        passing = 64 if dim == 64 or simple else 32
        assert products[name] == 3 * dim // 16 + 2 * passing // 16 + 128 // 16, name
        assert boxes[name] == 4 * -(-dim // 64), name
        assert copies[name] == (3 if simple else 4) and sums[name] >= 1, name
        assert resources.report(source, "90a")[name]["wide_stores"] > 0, name


def classes_of(name: str) -> tuple[int, int, bool]:
    """Of head dim and values' dim that a kernel is made for, one where they are the same; whether it is simple."""
    *dims, simple = (word.strip(" >") for word in name.split(",")[1:])
    return int(dims[0]), int(dims[-1]), simple == "true"


def test_a_report_depends_on_what_its_file_includes_and_on_nothing_else():
    files = {p.relative_to(ROOT / "csrc").as_posix() for p in resources.included_by(ROOT / "csrc/cuda/norm.cu")}
    assert {"cuda/norm.cu", "cuda/row.cuh", "cuda/ptx/memory.cuh", "common/tensor.h", "ops/norm.h"} <= files
    assert not {f for f in files if f.endswith(".cu")} - {"cuda/norm.cu"}
    assert "cuda/ptx/wgmma.cuh" not in files


@NEEDS_CUOBJDUMP
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_a_stage_of_a_product_is_multiplied_on_tensor_cores(architecture: str):
    """Of 64 x 64 x 32 in a warp: 64 instructions of 16 x 8 x 16, on 16 quadruples of matrices; 8 copies by a thread."""
    for source in resources.sources(architecture):
        if source.stem not in PRODUCTS:
            continue
        copies = resources.instructions(source, architecture, r"\bLDGSTS\.[\w.]*128")
        matrices = resources.instructions(source, architecture, r"\bLDSM\.16\.")
        for name, products in resources.instructions(source, architecture, r"\bHMMA\.16816\.F32").items():
            if name.startswith(PRODUCT_KERNELS):
                assert products >= 64 and matrices[name] >= 16 and copies[name] >= 8, name
                stores = resources.report(source, architecture)[name]["wide_stores"]
                assert stores > 0 or name.startswith("logits_of_span"), name  # which writes three numbers a token


def test_the_compiler_log_is_read_rightly():
    log = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    88 bytes stack frame, 84 bytes spill stores, 200 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 88 bytes cumulative stack size, 12544 bytes smem
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 29 registers
"""
    assert resources._usage(log) == {
        "_Z1av": {"registers": 128, "shared": 12544, "stack": 88, "spills": 284},
        "_Z1bv": {"registers": 29, "shared": 0, "stack": 0, "spills": 0},
    }


@pytest.mark.heavy
def test_the_module_builds_and_loads_without_a_driver(tmp_path: Path):
    """For one architecture. Where there is a driver, the backend has no reason to be unavailable."""
    import pybind11

    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake is not None
    configure = ["-DLLMENGINE_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80-real", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *configure], check=True, capture_output=True)
    subprocess.run([cmake, "--build", tmp_path, "--target", "_cuda"], check=True, capture_output=True)
    (module,) = tmp_path.glob("_cuda*.so")
    package = tmp_path / "site" / "llmengine"
    shutil.copytree(ROOT / "llmengine", package)
    shutil.copy(module, package)
    script = (
        "from llmengine import _cuda; assert 'cuda/attention_sm80_forward.cu' in _cuda.sources();"
        "from llmengine.backends import cuda; print(cuda.unavailable())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=package.parent,
    )  # fmt: skip
    if Path("/proc/driver/nvidia/version").exists():
        assert done.stdout.strip() == "None"
    else:
        assert re.search("driver|no CUDA", done.stdout), done.stdout
