"""Backends, and the choice among them.

Every operator is one opaque ``torch.ops.llmengine.*`` node; when it runs, `pick` asks the backends of its device in
order of preference and the first that does not refuse runs it. A refusal is a sentence: `explain` prints it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

__all__ = [
    "Backend", "Function", "backend", "define", "dispatch", "explain", "kernel", "known_backends", "pick", "report",
]  # fmt: skip

LIBRARY = torch.library.Library("llmengine", "DEF")

# For each device type, the backends in order of preference. A new backend is one word here.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
# Why a backend comes after the others of the table for an operator, though before the reference.
UNMEASURED = "no GPU has timed its {} yet: Triton's comes first, and this one where it is demanded"
STAND_BACK: dict[tuple[str, str], str] = {
    ("cuda", f"{op}_{part}"): UNMEASURED.format(op)
    for op in ("attention", "linear_cross_entropy", "linear_cross_entropy_shard")
    for part in ("forward", "backward")
} | {("cuda", "decode_attention"): UNMEASURED.format("decode_attention")}
FALLBACK = ("reference",)  # devices without kernels of their own
EXPLAINED = ("triton",)  # of what no table names for a device, `explain` says why not, all the same
BACKENDS = ("cuda", "triton", "cpu", "cuda_sim", "reference")  # cuda_sim, a simulator, only when it is demanded
VARIABLE = "LLMENGINE_BACKEND"
OPERATORS: dict[str, str] = {}  # name -> schema


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of one operator; `refuses(*args)` returns a reason, or None to accept."""

    run: Callable
    refuses: Callable[..., str | None] | None = None


@dataclass
class Backend:
    """The kernels of ``llmengine.backends.<name>``; `unavailable` says why none of them can run here."""

    name: str
    unavailable: str | None = None
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def has(self, op: str) -> bool:
        return op in self.kernels

    def refuses(self, op: str, args: tuple) -> str | None:
        if self.unavailable:
            return self.unavailable
        found = self.kernels.get(op)
        if found is None:
            return f"the {self.name} backend has no kernel for {op}"
        return found.refuses(*args) if found.refuses else None


_loaded: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """The backend of that name, imported at its first use."""
    if name not in _loaded:
        backend = Backend(name)
        try:
            module = importlib.import_module(f"llmengine.backends.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"llmengine.backends.{name}":
                raise
            backend.unavailable = f"llmengine has no {name} backend in this version"
        else:
            backend.unavailable = module.unavailable()
            backend.kernels = module.KERNELS
        _loaded[name] = backend
    return _loaded[name]


def known_backends() -> tuple[str, ...]:
    return BACKENDS


# ---- definition of operators -----------------------------------------------------------------------------------------


def define(schema: str, fake: Callable) -> Callable:
    """Registers an operator with torch.library and returns the way to it. The schema's name is the operator's."""
    name = schema.split("(", 1)[0]
    OPERATORS[name] = schema
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, lambda *args: dispatch(name, args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmengine::{name}", fake, lib=LIBRARY)
    node = getattr(torch.ops.llmengine, name).default
    if "!" in schema:
        return node

    def call(*args):
        return dispatch(name, args) if _unobserved(args) else node(*args)

    return call


_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_SCALARS = frozenset((type(None), bool, int, float, str, torch.dtype))
_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled
_keys_of = torch._C._dispatch_keys
# What a tensor of type torch.Tensor may be beside numbers in memory, and the dispatcher knows how to take.
_OTHER = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in (
        "Negative", "Conjugate", "ZeroTensor", "Functionalize", "FuncTorchBatched", "FuncTorchGradWrapper", "Meta",
    )
)  # fmt: skip
_plain: dict[int, bool] = {}  # by the bits of a tensor's keys


def _unobserved(args: Sequence) -> bool:
    """Whether PyTorch's dispatcher has nothing to do with a call but to hand it on: then it may be passed by.

    Nothing traces or compiles, no mode, transform or profiler wants to see the call, and each tensor is plain: no
    subclass, no wrapper, of memory that holds its elements as they are. Asked one by one, this is a third of what the
    dispatcher takes to box a call's arguments and to come back to Python with them.
    """
    if _is_compiling() or _dispatch_modes() or _function_modes() or _transforms() or _tracing() or _profiling():
        return False
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            if not _is_plain(arg):
                return False
        elif kind not in _SCALARS:
            return False
    return True


def _is_plain(tensor: torch.Tensor) -> bool:
    keys = _keys_of(tensor)
    bits = keys.raw_repr()
    known = _plain.get(bits)
    if known is None:
        known = _plain[bits] = not any(keys.has(other) for other in _OTHER)
    return known


class Function(torch.autograd.Function):
    """An autograd.Function that is entered without what only functorch's transforms have need of."""

    @classmethod
    def apply(cls, *args):
        if _unobserved(args):
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        return super().apply(*args)


def kernel(table: dict[str, Kernel], op: str, refuses: Callable[..., str | None] | None = None) -> Callable:
    """Decorator of a backend's file: enters the function into that backend's table as its kernel for `op`."""

    def enter(run: Callable) -> Callable:
        table[op] = Kernel(run, refuses)
        return run

    return enter


class Overrides:
    """Functions that stand in the place of ATen's kernels."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        """ATen's own are back."""
        if self.library is not None:
            self.library._destroy()
        self.library = None


def override(kernels: dict[str, Callable], dispatch_key: str) -> Overrides:
    """Puts functions in the place of ATen's kernels for a dispatch key. Operators that this PyTorch lacks are left."""
    library = torch.library.Library("aten", "IMPL", dispatch_key)
    for name, run in kernels.items():
        if hasattr(torch.ops.aten, name):
            library.impl(name, run, dispatch_key)
    return Overrides(library)


# ---- choice ----------------------------------------------------------------------------------------------------------


class _Choice(threading.local):
    """What a thread has said: the backend that it demands, and where it wants told who ran."""

    name: str | None = None
    log: list[tuple[str, list[tuple[str, str | None]]]] | None = None


_choice = _Choice()
_warned: set[tuple[str, str]] = set()
# Asked at every call. os.environ itself would raise and catch an error to say that it has no such variable.
_environment = getattr(os.environ, "_data", os.environ)
_variable = os.environ.encodekey(VARIABLE)


def demanded() -> str | None:
    """The backend that ``with llmengine.backend(...)`` or LLMENGINE_BACKEND demands, if any."""
    name = _choice.name
    if name is None and _variable in _environment:
        name = os.environ[VARIABLE] or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, operators of this thread run on backend `name`, or raise with its reason: no falling back.

    So do their backwards: those of a GPU's tensors stay in this thread, too.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    previous = _choice.name
    _choice.name = name
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _choice.name = previous


def device_type(args: tuple) -> str:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
        if isinstance(arg, list) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0].device.type
    return "cpu"


def pick(op: str, args: tuple, device: str | None = None) -> tuple[str, Kernel]:
    """The name and kernel of the backend that runs `op` on these arguments, which lie on `device`."""
    device = device or device_type(args)
    wanted = demanded()
    if wanted is not None:
        chosen = load(wanted)
        reason = chosen.refuses(op, args)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {wanted!r} was demanded but refuses: {reason}")
        _record(op, [], wanted, ())
        return wanted, chosen.kernels[op]
    refusals: list[tuple[str, str]] = []
    for name, behind in _order(op, PREFERENCE.get(device, FALLBACK)):
        candidate = _loaded.get(name) or load(name)
        reason = candidate.refuses(op, args) or behind
        if reason is None:
            if name == "reference" and refusals:
                _warn_fallback(op, device, refusals)
            _record(op, refusals, name, args)
            return name, candidate.kernels[op]
        if (name, reason) not in refusals:
            refusals.append((name, reason))
    raise RuntimeError(f"{op}: no backend accepts these arguments: " + "; ".join(f"{n}: {r}" for n, r in refusals))


@functools.cache
def _order(op: str, names: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """The backends to ask; one that stands back is named first, with why, and asked before the reference."""
    now: list[tuple[str, str | None]] = []
    later: list[tuple[str, str | None]] = []
    for name in names:
        behind = STAND_BACK.get((name, op))
        if name == "reference":
            now += later
        if behind:
            later.append((name, None))
        now.append((name, behind))
    return now


def dispatch(op: str, args: tuple):
    device = device_type(args)
    run = pick(op, args, device)[1].run
    if not (_any_autocast() and torch.is_autocast_enabled(device)):
        return run(*args)
    # The public functions have cast what autocast casts; a kernel's own arithmetic keeps its precision.
    with torch.autocast(device, enabled=False):
        return run(*args)


def _warn_fallback(op: str, device: str, refusals: list[tuple[str, str]]) -> None:
    if (op, device) in _warned:
        return
    _warned.add((op, device))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    warnings.warn(f"llmengine: {op} on {device} runs on the slow reference backend ({reasons})", stacklevel=4)


# ---- explanation -----------------------------------------------------------------------------------------------------


def _record(op: str, refusals: list[tuple[str, str]], ran: str, args: tuple) -> None:
    if (log := _choice.log) is not None:
        others = [name for name in EXPLAINED if args and name not in PREFERENCE.get(device_type(args), FALLBACK)]
        reasons = [(name, reason) for name in others if (reason := load(name).refuses(op, args))]
        log.append((op, [*refusals, *reasons, (ran, None)]))


def explaining() -> bool:
    """Whether what is told is heard."""
    return bool(_choice.log)


def note(op: str, who: str, why: str) -> None:
    """From a public function: what `explain` says of a call that no kernel of ours runs."""
    if not _is_compiling() and (log := _choice.log) is not None:
        log.append((op, [(who, why)]))


def tell(detail: str) -> None:
    """From within a kernel: what `explain` says beside its backend."""
    if _choice.log:
        answers = _choice.log[-1][1]
        name, before = answers[-1]
        answers[-1] = (name, f"{before}; {detail}" if before else detail)


def explain(function: str | Callable, *args, **kwargs) -> str:
    """Runs a public operator once and tells, for each kernel it used, which backend ran it and why the others did not.

    `function` is a name of `llmengine.functional` ("layer_norm") or any callable, such as a model.
    """
    if isinstance(function, str):
        functional = importlib.import_module("llmengine.functional")
        operators = [name for name in functional.__all__ if not isinstance(getattr(functional, name), type)]
        if function not in operators:
            raise ValueError(f"explain: {function!r} is not one of {', '.join(operators)}")
        call = getattr(functional, function)
    else:
        call = function
    log: list[tuple[str, list[tuple[str, str | None]]]] = []
    _choice.log = log
    try:
        with torch.autograd.set_multithreading_enabled(False):  # a backward tells its kernels to this thread's log
            call(*args, **kwargs)
    finally:
        _choice.log = None
    lines = []
    for op, answers in log:
        ran, detail = answers[-1]
        line = f"{op}: {ran}" + (f" ({detail})" if detail else "")
        line += "".join(f"\n  not {name}: {why}" for name, why in answers[:-1])
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def report() -> dict:
    """What `llmengine info` prints: for each backend why it is unavailable, if it is, and the operators it has."""
    for door in ("functional", "optim"):
        importlib.import_module(f"llmengine.{door}")
    rows = {}
    for name in BACKENDS:
        loaded = load(name)
        rows[name] = {"unavailable": loaded.unavailable, "operators": sorted(loaded.kernels)}
    cpu = load("cpu")
    module = importlib.import_module("llmengine._cpu") if cpu.unavailable is None else None
    return {
        "operators": sorted(OPERATORS),
        "backends": rows,
        "cpu_isa": module.isa() if module else None,
        "cpu_isas_supported": list(module.supported_isas()) if module else [],
        "cpu_isa_notice": module.isa_notice() if module else "",
    }
