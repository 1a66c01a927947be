"""What every CUDA kernel takes of a multiprocessor, read from the compiler: no GPU is needed.

`python -m llmengine.testing.resources FILE` writes the committed budget anew, after a change that is meant.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3")


def nvcc() -> str | None:
    return shutil.which("nvcc")


def sources(architecture: str) -> list[Path]:
    """The files that are compiled for an architecture: those named for sm_90a for it alone, as CMakeLists.txt does."""
    files = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    return [f for f in files if architecture == "90a" or "_sm90a" not in f.stem]


def virtual(source: Path, architecture: str) -> str:
    """The architecture whose PTX becomes the machine code, as CMakeLists.txt has it."""
    return "80" if architecture == "90a" and "_sm90a" not in source.stem else architecture


def report(source: Path, architecture: str) -> dict[str, dict[str, int]]:
    """For every kernel of a file: registers, shared, stack, spills, its 16-byte accesses of global memory, and how many
    waits of its own the assembler put between products of warpgroups.

    Compiling takes a minute, so a result is kept under build/ until a file that it depends on changes.
    """
    compiler = nvcc()
    assert compiler, "nvcc is not on the PATH"
    kept = ROOT / "build" / "resources" / f"{source.stem}-{architecture}-{_fingerprint(compiler, source)}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    result = kept.with_suffix(".json")
    if not result.exists():
        found = _compile(compiler, source, architecture, kept)
        result.write_text(json.dumps(found, indent=1, sort_keys=True))
    return json.loads(result.read_text())


def _fingerprint(compiler: str, source: Path) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + repr(FLAGS).encode())
    for path in included_by(source):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def included_by(source: Path) -> list[Path]:
    """The file and every file of csrc/ that it includes, straight or by way of others."""
    found: set[Path] = set()
    ahead = [source]
    while ahead:
        path = ahead.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), flags=re.M):
            ahead += [p for p in (path.parent / name, ROOT / "csrc" / name) if p.is_file()][:1]
    return sorted(found)


def _compile(compiler: str, source: Path, architecture: str, kept: Path) -> dict[str, dict[str, int]]:
    """By way of PTX, where a 16-byte access is one instruction that the assembler does not split."""
    ptx, cubin = kept.with_suffix(".ptx"), kept.with_suffix(".cubin")
    assembler = shutil.which("ptxas") or str(Path(compiler).resolve().parent / "ptxas")
    front = [f"-arch=compute_{virtual(source, architecture)}", "-ptx", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *FLAGS, *front, source, "-o", ptx], check=True, capture_output=True, text=True)
    done = subprocess.run(
        [assembler, "-v", "-O3", f"-arch=sm_{architecture}", ptx, "-o", cubin],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    log = done.stdout + done.stderr
    usage = _usage(log)
    accesses = _wide_accesses(ptx.read_text())
    ptx.unlink()
    names = _demangled(list(usage))
    waits = {m: {"injected_waits": len(re.findall(rf"\(C75\d\d\).*'{m}'", log))} for m in usage}
    return {names[mangled]: usage[mangled] | accesses[mangled] | waits[mangled] for mangled in usage}


def instructions(source: Path, architecture: str, pattern: str) -> dict[str, int]:
    """How many instructions in the machine code of each kernel match; needs cuobjdump."""
    report(source, architecture)
    name = f"{source.stem}-{architecture}-{_fingerprint(nvcc() or '', source)}.cubin"
    counts = instructions_of_cubin(ROOT / "build" / "resources" / name, pattern)
    names = _demangled(list(counts))
    return {names[mangled]: count for mangled, count in counts.items()}


def instructions_of_cubin(cubin: Path, pattern: str) -> dict[str, int]:
    """The same of machine code alone, for each kernel by its name there."""
    disassembler = cuobjdump()
    assert disassembler, "cuobjdump is not at hand"
    code = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {p.split("\n")[0].strip(): len(re.findall(pattern, p)) for p in code.split("Function : ")[1:]}


def usage_of_cubin(cubin: Path) -> dict[str, dict[str, int]]:
    """What kernels take by the machine code alone, each by its name there; spills lie on the stack."""
    command = [cuobjdump() or "cuobjdump", "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return {k: dict(zip(("registers", "stack", "local"), map(int, n), strict=True)) for k, *n in kernels}


def cuobjdump() -> str | None:
    """NVIDIA's, from the toolkit or from Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


def _usage(log: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for part in log.split("Compiling entry function '")[1:]:

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        found[part.split("'")[0]] = {
            "registers": number(r"Used (\d+) registers"),
            "shared": number(r"(\d+) bytes smem"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        }
    return found


def _wide_accesses(ptx: str) -> dict[str, dict[str, int]]:
    found = {}
    for part in ptx.split(".entry ")[1:]:
        loads, stores = (len(re.findall(rf"\b{word}\.global[\w.:]*\.v4\.", part)) for word in ("ld", "st"))
        found[part.split("(")[0].strip()] = {"wide_loads": loads, "wide_stores": stores}
    return found


def _demangled(names: list[str]) -> dict[str, str]:
    """`norm_forward_held<float, 4>` for each mangled name."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {m: _short(d) for m, d in zip(names, done.stdout.splitlines(), strict=True)}


def _short(name: str) -> str:
    name = re.sub(
        r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|llmengine::(?:cuda::)?(?:attention::)?|^void ", "", name
    )
    name = re.sub(r"\([\w:]+\)(?=\d)", "", name)  # an enumerator is its number
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def everything() -> dict[str, dict[str, dict[str, int]]]:
    """The reports of all files: architecture -> kernel -> what it takes."""
    return {
        f"sm_{a}": {name: taken for source in sources(a) for name, taken in report(source, a).items()}
        for a in ARCHITECTURES
    }


if __name__ == "__main__":
    budget = {
        architecture: {name: {k: taken[k] for k in ("registers", "shared")} for name, taken in kernels.items()}
        for architecture, kernels in everything().items()
    }
    lines = [
        f'"{a}": {{\n' + ",\n".join(f'  "{n}": {json.dumps(t)}' for n, t in sorted(kernels.items())) + "\n}"
        for a, kernels in budget.items()
    ]
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")
