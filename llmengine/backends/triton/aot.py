"""Compiles the kernels for GPUs that need not be here, and reads from the machine code what they take of one.

    python -m llmengine.backends.triton.aot [--quick] [--architectures sm_90 ...] [--operators norm ...] [--json FILE]
    python -m llmengine.backends.triton.aot --budget tests/triton_budget.json [--architectures ...] [--dtypes ...]

An operator's file offers `aot_calls(dtype)`: named calls of its own entry points on meta tensors, which between them
reach every kernel and tile class. They choose tiles as they would on the architecture in question; a launch is recorded
instead of made. So what is compiled here is what is launched there, down to the specialisation on strides and
alignment. A call whose name ends in "TF32" is made with PyTorch's switch for that on. The exit status is 1 where a
kernel spills registers, or asks for more shared or tensor memory than there is.

The second form writes what the chosen architectures and dtypes take into the committed budget, that tests hold every
kernel to: of each call and kernel [warps, registers, bytes spilled, bytes of shared memory], the most of its launches.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from llmengine.backends.triton import device

OPERATORS = (
    "adamw",
    "attention",
    "chain_field",
    "cross_entropy",
    "decode_attention",
    "embedding",
    "ffn",
    "gradient_norm",
    "linear_cross_entropy",
    "norm",
    "relative_attention",
    "rotary",
    "softmax",
)


@dataclass(frozen=True)
class Architecture:
    target: GPUTarget
    shared_limit: int  # bytes that a program may ask for
    matrix_instructions: tuple[str, ...]  # by which tl.dot of 16-bit tiles shows in the assembly


ARCHITECTURES = {
    # the limit of compute capability 8.6, 8.9 and 12.0: what keeps it runs on all of them (8.0 has 163 KiB)
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 99 * 1024, ("mma.sync",)),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 * 1024, ("wgmma", "mma.sync")),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 * 1024, ("tcgen05", "mma.sync")),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * 1024, ("v_mfma",)),
}


TENSOR_MEMORY = 512  # columns of a multiprocessor's; Triton refuses to launch what asks for more


@dataclass(frozen=True)
class Launch:
    function: JITFunction
    args: tuple
    keywords: dict[str, Any]

    def kernel(self) -> str:
        """As file.function."""
        return f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}"


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes of one architecture."""

    operator: str
    call: str
    kernel: str
    dtype: str
    architecture: str
    constants: dict[str, Any]
    num_warps: int
    registers: int
    spilled: int  # bytes of a thread's stack and local memory
    shared: int  # bytes of a program
    tensor_memory: int  # columns of it, on Blackwell
    matrix_instruction: str | None
    seconds: float
    repeated: bool = False  # compiled already, for another call

    def takes(self) -> list[int]:
        """As the budget has it."""
        return [self.num_warps, self.registers, self.spilled, self.shared]

    def problem(self) -> str | None:
        if self.spilled:
            return f"{self.spilled} bytes a thread are spilled"
        if self.shared > (limit := ARCHITECTURES[self.architecture].shared_limit):
            return f"{self.shared} bytes of shared memory, allowed: {limit}"
        if self.tensor_memory > TENSOR_MEMORY:
            return f"{self.tensor_memory} columns of tensor memory, allowed: {TENSOR_MEMORY}"
        return None


def launches(operator: str, dtype: torch.dtype, architecture: str) -> Iterator[tuple[str, list[Launch]]]:
    """Each call of the operator's `aot_calls` with the launches that it makes."""
    module = importlib.import_module(f"llmengine.backends.triton.{operator}")
    for name, call in module.aot_calls(dtype):
        made: list[Launch] = []
        with _recording(made), device.assume(architecture), _switched(name.endswith("TF32")):
            call()
        yield name, made


@contextlib.contextmanager
def _switched(tf32: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def _recording(made: list[Launch]) -> Iterator[None]:
    def record(self, *args, grid, warmup, **keywords):
        made.append(Launch(self, args, keywords))

    with mock.patch.object(JITFunction, "run", record):
        yield


def compile_launch(launch: Launch, architecture: str) -> tuple[tuple, Any]:
    """(identity, thunk that compiles): equal identities give equal code."""
    target = ARCHITECTURES[architecture].target
    backend, function = make_backend(target), launch.function
    # As JITFunction.run binds and specialises its arguments (Triton 3.6 to 3.9).
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.keywords)
    options, signature, constants, attributes = function._pack_args(
        backend, launch.keywords, bound, specialization, options
    )
    source = ASTSource(function, signature, constants, attributes)
    identity = (source.hash(), str(options), architecture)
    return identity, lambda: triton.compile(source, target=target, options=options.__dict__)


def compile_all(
    operators: tuple[str, ...], architectures: tuple[str, ...], dtypes: tuple[torch.dtype, ...], quick: bool = False
) -> Iterator[Compiled]:
    """Every launch, as its kernel is compiled; quick: of each operator's first call alone."""
    known: dict[tuple, Compiled] = {}
    for operator in operators:
        for dtype in dtypes:
            for architecture in architectures:
                for i, (call, made) in enumerate(launches(operator, dtype, architecture)):
                    if quick and i:
                        break
                    for launch in made:
                        identity, build = compile_launch(launch, architecture)
                        if found := known.get(identity):
                            yield replace(found, operator=operator, call=call, dtype=_name(dtype), repeated=True)
                        else:
                            known[identity] = _compiled(operator, call, launch, dtype, architecture, build)
                            yield known[identity]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Budget = dict[str, Any]  # architecture: dtype: "operator, call": kernel: what it takes; and "triton": the version


def budget_of(rows: Iterable[Compiled]) -> Budget:
    budget: Budget = {"triton": triton.__version__}
    for row in rows:
        of_dtype = budget.setdefault(row.architecture, {}).setdefault(row.dtype, {})
        kernels = of_dtype.setdefault(f"{row.operator}, {row.call}", {})
        kernels[row.kernel] = list(map(max, row.takes(), kernels.get(row.kernel, row.takes())))
    return budget


def add_to_budget(path: Path, budget: Budget) -> None:
    """In the place of what the file has of the same architectures and dtypes. What another Triton compiled goes."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("triton") == budget["triton"]:
        budget = budget | {name: before.get(name, {}) | budget.get(name, {}) for name in ARCHITECTURES}
    path.write_text(_text(budget, 3) + "\n")


def _text(value: Any, levels: int) -> str:
    """JSON, of which that many levels have a line for each key."""
    if not levels or not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {_text(v, levels - 1)}" for k, v in sorted(value.items())) + "\n}"


def _compiled(operator, call, launch, dtype, architecture, build) -> Compiled:
    start = time.perf_counter()
    binary = build()
    seconds = time.perf_counter() - start
    read = _read_amdgcn if "amdgcn" in binary.asm else _read_cubin
    registers, spilled = read(binary)
    assembly = binary.asm["amdgcn"] if "amdgcn" in binary.asm else binary.asm["ptx"]
    found = [word for word in ARCHITECTURES[architecture].matrix_instructions if word in assembly]
    constants = {k: v for k, v in launch.keywords.items() if isinstance(v, (int, str)) and k != "num_warps"}
    return Compiled(
        operator, call, launch.kernel(), _name(dtype), architecture, constants,
        binary.metadata.num_warps, registers, spilled, binary.metadata.shared,
        getattr(binary.metadata, "tmem_size", None) or 0, found[0] if found else None, round(seconds, 2),
    )  # fmt: skip


def _read_cubin(binary) -> tuple[int, int]:
    """(registers, bytes spilled) of a thread, by cuobjdump, which ships with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _read_amdgcn(binary) -> tuple[int, int]:
    """(vector registers, bytes spilled) of a thread, from the metadata that ends the assembly."""
    text = binary.asm["amdgcn"]
    (registers,), (private,) = (
        re.findall(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return int(registers), int(private)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llmengine.backends.triton.aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--architectures", nargs="+", choices=tuple(ARCHITECTURES), default=tuple(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=None)
    parser.add_argument("--quick", action="store_true", help="each operator's first call, in bfloat16 unless told")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--budget", type=Path, help="put the architectures and dtypes into this file")
    given = parser.parse_args()
    if given.budget and (given.quick or len(given.operators) < len(OPERATORS)):
        parser.error("--budget holds every call of every operator; leave out --quick and --operators")
    names = given.dtypes or (("bfloat16",) if given.quick else ("float32", "bfloat16", "float16"))
    dtypes = tuple(getattr(torch, name) for name in names)
    rows = []
    print(f"{'kernel':32} {'dtype':9} {'arch':7} warps  regs spill  shared  dot       call")
    for row in compile_all(tuple(given.operators), tuple(given.architectures), dtypes, given.quick):
        rows.append(row)
        if row.repeated:
            continue
        print(
            f"{row.kernel:32} {row.dtype:9} {row.architecture:7} {row.num_warps:5} "
            f"{row.registers:5} {row.spilled:5} {row.shared:7}  {row.matrix_instruction or '-':9} {row.call}"
            + (f"  <- {row.problem()}" if row.problem() else ""),
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if given.budget:
        add_to_budget(given.budget, budget_of(rows))
    rows = [row for row in rows if not row.repeated]
    wrong = sum(row.problem() is not None for row in rows)
    print(f"{len(rows)} kernels compiled in {sum(row.seconds for row in rows):.0f} s, {wrong} with problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
