"""A native module that has the kernels of csrc/cuda, and what all of them share in Python.

There are two such modules: `llmengine._cuda` for devices, and `llmengine._cuda_sim`, the same kernels in the simulator.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmengine.backends.cuda import makers
from llmengine.ops import registry

HALVES = (torch.bfloat16, torch.float16)  # what our products multiply
DTYPES = (torch.float32, *HALVES)
# Who multiplies the matrices of operators: "blas", PyTorch's cuBLAS, where an operator can do with it; "sm80", kernels
# over csrc/cuda/gemm_sm80.cuh, of bfloat16 and float16; "sm90a", those over gemm_sm90a.cuh, and sm80's for what TMA
# cannot fetch; "own", the one of the two that is made for the device; a bench.json: whoever was quickest (makers.py).
# No GPU has timed them yet: until then cuBLAS multiplies, and "own" where it cannot; in the simulator, which has no
# cuBLAS, sm80.
PRODUCTS = "LLMENGINE_CUDA_PRODUCTS"
MAKERS = ("blas", "own", "sm80", "sm90a")
# Whose attention runs: "sm80", every GPU's, or "sm90a", Hopper's (csrc/cuda/attention_sm90a_*.cu) where a call's layout
# is one for tensor maps. No GPU has timed it yet: until then it is asked for.
ATTENTION = "LLMENGINE_CUDA_ATTENTION"
ATTENTIONS = ("sm80", "sm90a")
# How Hopper's attention runs backward: "two_pass", a kernel for keys and one for queries, or "one_pass" over the
# scores, which adds gradients of queries up on a grid of integers (csrc/cuda/attention_grid.h). No GPU has timed them.
ATTENTION_BACKWARD = "LLMENGINE_CUDA_ATTENTION_BACKWARD"
ATTENTION_BACKWARDS = ("two_pass", "one_pass")
# Whether kernels of sm80's attention are those for the very head dim, up to a multiple of 16, compiled when they are
# first used (jit.py), or "0", of the classes that are built ahead. No GPU has run compiled ones yet.
JIT = "LLMENGINE_CUDA_JIT"
BUILT_AHEAD = (64, 128, 256)
HOPPER = (9, 0)  # compute capability


@contextlib.contextmanager
def setting(variable: str, value: str) -> Iterator[None]:
    """Within the block, what a variable of the environment says."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def products_by(maker: str) -> contextlib.AbstractContextManager[None]:
    return setting(PRODUCTS, maker)


def attention_by(kernels: str) -> contextlib.AbstractContextManager[None]:
    return setting(ATTENTION, kernels)


def attention_backward_by(passes: str) -> contextlib.AbstractContextManager[None]:
    return setting(ATTENTION_BACKWARD, passes)


def exact_kernels(wanted: bool = True) -> contextlib.AbstractContextManager[None]:
    return setting(JIT, str(int(wanted)))


def _chosen(variable: str, choices: tuple[str, ...], default: str) -> str:
    chosen = os.environ.get(variable) or default
    if chosen not in choices:
        raise ValueError(f"{variable}: {chosen!r} is not one of {', '.join(choices)}")
    return chosen


class Native:
    """`name` is the module, `backend` the backend that refuses, `device_type` the type of the tensors that it takes."""

    def __init__(self, name: str, backend: str, device_type: str, build_hint: str):
        self.name, self.backend, self.device_type, self.build_hint = name, backend, device_type, build_hint
        self.module: Any = None

    def missing(self) -> str | None:
        """Why the module cannot be had, or None: then `module` is there. Imported at the first question."""
        if self.module is None:
            try:
                self.module = importlib.import_module(self.name)
            except ImportError as error:
                return f"the native module {self.name} is not built ({error}); {self.build_hint}"
        return None

    def call(self, kernel: str, on: Tensor, **arguments) -> None:
        """Launches a kernel on the current stream of the device that `on` lies on."""
        self.module.take_launched(), self.module.take_left()  # of a call that failed: not this one's to tell
        if on.is_cuda:
            with torch.cuda.device(on.device):
                stream = torch.cuda.current_stream().cuda_stream
                getattr(self.module, kernel)(**arguments, stream=stream)
        else:
            getattr(self.module, kernel)(**arguments, stream=0)
        if registry.explaining() and (left := self.module.take_left()):
            registry.tell("sm80 where TMA cannot fetch " + ", nor ".join(dict.fromkeys(left)))

    def ask(self, function: str, on: Tensor, **arguments):
        """A question about the device that `on` lies on."""
        with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
            return getattr(self.module, function)(**arguments)

    def _maker(self) -> str:
        given = os.environ.get(PRODUCTS) or ""
        if makers.is_table(given):
            return given
        return _chosen(PRODUCTS, MAKERS, "sm80" if self.device_type == "cpu" else "blas")

    def core_of(
        self, operator: str, x: Tensor, *weights: Tensor | None, backward: bool = False, part: str = "products"
    ) -> str | None:
        """Whose kernels multiply x (tokens, in) by weights (out, in) in a call of an operator that can do with cuBLAS;
        None: cuBLAS does. `explain` says who, and why."""
        maker, why = self._chosen_maker(operator, x, weights, backward)
        core = None if maker == "blas" else self._own(x) if maker == "own" else maker
        if registry.explaining():
            registry.tell(f"{part} by {core or 'cuBLAS'} ({why})")
        return core

    def core_alone(self, operator: str, x: Tensor, weight: Tensor, backward: bool = False) -> str:
        """The same of an operator that cannot do with cuBLAS, since its products end in their registers: where that
        is asked for, or nothing is measured, the core that is made for the device."""
        maker, why = self._chosen_maker(operator, x, (weight,), backward)
        if maker == "blas":
            why += "; what these products end in is not cuBLAS's"
        core = self._own(x) if maker in ("blas", "own") else maker
        if registry.explaining():
            registry.tell(f"products by {core} ({why})")
        return core

    def _own(self, on: Tensor) -> str:
        return "sm90a" if self.capability(on) == HOPPER else "sm80"

    def _chosen_maker(
        self, operator: str, x: Tensor, weights: tuple[Tensor | None, ...], backward: bool
    ) -> tuple[str, str]:
        """(maker, why)."""
        maker, given = self._maker(), [w for w in weights if w is not None]
        why = f"{PRODUCTS}={maker}" if os.environ.get(PRODUCTS) else "the default; no GPU has timed ours yet"
        if x.dtype not in HALVES:
            maker, why = "blas", "ours are of bfloat16 and float16"
        elif makers.is_table(maker):
            name = operator if len(given) == 1 else f"gated_{operator}"
            layer = makers.Layer(name, makers.DTYPES[x.dtype], (x.shape[1], given[0].shape[0]))
            maker, why = makers.quickest(maker, self.device_name(x), layer, backward, x.shape[0])
        return maker, why

    def products(self, on: Tensor, core: str) -> dict[str, Any]:
        """What kernels with products of our own are given."""
        return {"core": core, "room": self.room(on)}

    def room(self, on: Tensor) -> Tensor:
        """For sums of parts of k, as many as the tiles that are made at once (csrc/cuda/gemm.cu)."""
        return on.new_empty(2 * self.multiprocessors(on) * 128 * 128, dtype=torch.float32)

    def refuses_products(self, on: Tensor) -> str | None:
        """Of operators whose matrices are multiplied in the dtype and on the device of `on`."""
        return self._not_hopper(PRODUCTS, on) if on.dtype in HALVES and self._maker() == "sm90a" else None

    def refuses_attention(self, on: Tensor) -> str | None:
        return self._not_hopper(ATTENTION, on) if self.wants_hopper_attention() else None

    def _not_hopper(self, variable: str, on: Tensor) -> str | None:
        """Why kernels for Hopper, for which a variable asks, do not run on the device that `on` lies on."""
        if (found := self.capability(on)) == HOPPER:
            return None
        return f"{variable}=sm90a is for compute capability 9.0, the device has {found[0]}.{found[1]}"

    def wants_hopper_attention(self) -> bool:
        return _chosen(ATTENTION, ATTENTIONS, ATTENTIONS[0]) == "sm90a"

    def wants_one_pass(self) -> bool:
        return _chosen(ATTENTION_BACKWARD, ATTENTION_BACKWARDS, ATTENTION_BACKWARDS[0]) == "one_pass"

    def wants_exact(self) -> bool:
        return _chosen(JIT, ("0", "1"), "0") == "1"

    def tell_launched(self) -> None:
        """To `explain`: which of this thread's last kernels were compiled when they were first used."""
        if kernels := self.module.take_launched():
            registry.tell("compiled at first use: " + ", ".join(k.replace("llmengine::", "") for k in kernels))

    def device_name(self, on: Tensor) -> str:
        return torch.cuda.get_device_properties(on.device).name if on.is_cuda else "simulator"

    def capability(self, on: Tensor) -> tuple[int, int]:
        """Of the device that `on` lies on; the simulator's is a Hopper (csrc/sim/simulator.h)."""
        return torch.cuda.get_device_capability(on.device) if on.is_cuda else HOPPER

    def multiprocessors(self, on: Tensor) -> int:
        """Of the device that `on` lies on; the simulator's has few (csrc/sim/simulator.h)."""
        return torch.cuda.get_device_properties(on.device).multi_processor_count if on.is_cuda else 3

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a b + bias in their precision, by cuBLAS. The simulator has none: there the sums are float64's, so that the
        result does not depend on how PyTorch's threads share them."""
        if not a.is_cuda:
            exact = a.double() @ b.double()
            return (exact if bias is None else exact + bias).to(a.dtype)
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)

    def weight_gradient(self, grad: Tensor, x: Tensor, dtype: torch.dtype, main: Tensor | None) -> Tensor:
        """grad^T x in `dtype` or, where there is a buffer, float32, for it, added to that; by cuBLAS (in the simulator
        as above)."""
        if main is not None:
            return self.product_into(main, grad.T, x, add=True)
        if not x.is_cuda:
            return (grad.T.double() @ x.double()).to(dtype)
        return torch.mm(grad.T, x) if dtype == x.dtype else torch.mm(grad.T, x, out_dtype=dtype)

    def product_into(self, out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
        """a b in their precision or in float32, in place of what `out` holds or added to it; by cuBLAS (in the
        simulator as above)."""
        if not a.is_cuda:
            exact = a.double() @ b.double()
            out.copy_(out.double() + exact if add else exact)
        elif a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
        elif add:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return out

    def refuses_tensors(self, *tensors: Tensor | None) -> str | None:
        """The refusals that all kernels have in common: a device or float dtype that they do not take."""
        given = [t for t in tensors if t is not None]
        for tensor in given:
            if tensor.device.type != self.device_type:
                return f"the {self.backend} backend takes {self.device_type} tensors, got one on {tensor.device}"
            if tensor.device != given[0].device:
                return f"the tensors lie on different devices, {given[0].device} and {tensor.device}"
            if tensor.is_floating_point() and tensor.dtype not in DTYPES:
                dtype = str(tensor.dtype).removeprefix("torch.")
                return f"the {self.backend} backend takes float32, bfloat16 and float16, got {dtype}"
        return None


def unit_last_stride(x: Tensor | None) -> Tensor | None:
    """`x`, or a copy of it where its last dimension is strided (a transposed or expanded tensor)."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def parts_of(rows: int) -> int:
    """In how many parts csrc/cuda/column_sums.cu adds rows up for a bias's gradient: at most 64, and as many as keep a
    part from becoming shorter than a few rows for each of a block's warps."""
    return max(1, min(64, rows // 32))


def parameter(x: Tensor | None, rows: Tensor) -> Tensor | None:
    """A weight or bias as kernels take it: contiguous, float32 or of the rows' dtype."""
    if x is None:
        return None
    return (x if x.dtype in (torch.float32, rows.dtype) else x.float()).contiguous()
