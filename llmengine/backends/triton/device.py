"""Where Triton kernels run: on a GPU, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1, for tests)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

try:
    import triton
except ImportError as error:
    INTERPRETED = False
    _missing: str | None = f"Triton cannot be imported ({error}); run `pip install triton`"
else:
    INTERPRETED = triton.knobs.runtime.interpret
    _missing = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NVIDIA before Ampere has no bfloat16 and too little shared memory for the tiles here.
OLDEST = (8, 0)


@functools.cache
def unavailable() -> str | None:
    """Why no Triton kernel can run here, on any GPU."""
    if _missing or INTERPRETED:
        return _missing
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return next(iter(too_old().values())) if len(too_old()) == torch.cuda.device_count() else None


@functools.cache
def too_old() -> dict[int | None, str]:
    """Of the GPUs that no Triton kernel can run on, by number: why."""
    if INTERPRETED or torch.version.hip is not None:
        return {}
    found = ((i, torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count()))
    return {
        i: f"the GPU has compute capability {major}.{minor}; the kernels need 8.0"
        for i, (major, minor) in found
        if (major, minor) < OLDEST
    }


def refuses_tensors(*tensors: Tensor | None) -> str | None:
    """The refusals that all Triton kernels have in common: a device or float dtype that they do not take."""
    for tensor in tensors:
        if tensor is None:
            continue
        if INTERPRETED != tensor.is_cpu:
            taken = "CPU tensors while TRITON_INTERPRET is set" if INTERPRETED else "GPU tensors"
            return f"the triton backend takes {taken}, got one on {tensor.device}"
        if (old := too_old()) and (reason := old.get(tensor.device.index)):
            return reason
        if tensor.is_floating_point() and (reason := refuses_dtype(tensor.dtype)):
            return reason
    return None


def refuses_dtype(dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"the triton backend takes float32, bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly; it runs float32 and float16"
    return None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of streaming multiprocessors; what persistent kernels size their grid by."""
    if device.type == "meta":
        return 132
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


_assumed: str | None = None


def architecture(device: torch.device) -> str:
    """What tables of tiles are keyed by: "sm_80", "sm_90", "gfx942", ..., or "interpreter"."""
    return _assumed or _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def is_amd(name: str) -> bool:
    """Of an architecture."""
    return name.startswith("gfx")


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """What tl.dot makes of float32: exact products, unless PyTorch has been told that its own may be TF32's, and the
    GPU has such (of AMD's, Triton gives them to CDNA3 alone). The switch is read by its newer name, which knows of
    both: the older one raises once the newer has been set."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    place = architecture(device)
    return "ieee" if is_amd(place) and place != "gfx942" else "tf32"


def all_registers(device: torch.device, warps: int) -> dict[str, int]:
    """The launch option by which a program may take all of a multiprocessor's registers. Left alone, NVIDIA's assembler
    spills a few bytes of a large kernel where that makes room for one more program."""
    place = architecture(device)
    return {} if INTERPRETED or is_amd(place) else {"maxnreg": min(255, 65536 // (32 * warps))}


def device_name(device: torch.device) -> str:
    """What files about a GPU are named by."""
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


@contextlib.contextmanager
def assume(name: str) -> Iterator[None]:
    """Within the block, tiles are chosen as on that architecture: for compiling ahead of time (aot.py)."""
    global _assumed
    _assumed = name
    try:
        yield
    finally:
        _assumed = None


def on_its_device(run: Callable) -> Callable:
    """`run`, with the first tensor's GPU as the current one: Triton launches there, wherever the tensors are."""
    if torch.cuda.device_count() < 2:
        return run

    @functools.wraps(run)
    def guarded(*args):
        tensors = (arg[0] if isinstance(arg, list) and arg else arg for arg in args)
        with torch.cuda.device(next(arg.device for arg in tensors if isinstance(arg, Tensor))):
            return run(*args)

    return guarded


def unit_last_stride(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its last dimension is strided (a transposed or expanded tensor)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def dropped_below(dropout_p: float) -> int:
    """Draws below this, of 32 bits, are dropped (csrc/ops/philox.h)."""
    return int(dropout_p * 2**32)
