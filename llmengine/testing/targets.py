"""What the operator tests run on: every backend with kernels of its own that works here, with its device and dtypes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmengine.ops import registry
from llmengine.testing import simulator
from llmengine.testing.law import GRADIENT
from llmengine.testing.sample import Operator

# Nodes that CUDA takes in bfloat16 and float16 alone.
HALVES_ONLY = ("attention", "decode_attention", "fp8_attention", "linear_cross_entropy", "linear_cross_entropy_shard")
# Nodes that CUDA takes on a Hopper alone.
HOPPER_ONLY = ("fp8_linear",)


@dataclass(frozen=True)
class Target:
    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    # An interpreter, a few hundred times slower than a processor, or a compiler that takes seconds for every new
    # combination of options.
    slow: bool = False
    # Called with a test's name before it runs: builds what the backend needs.
    prepare: Callable[[str], None] | None = None
    # Nodes that it does not take, or in some dtypes only, float32 not among them: tests of their own try those
    # (tests/sim/test_attention.py, test_decode_attention.py, test_linear_cross_entropy.py).
    partial: tuple[str, ...] = ()

    def always_tries(self, operator: Operator, sample: int, dtype: torch.dtype) -> bool:
        """Whether the sample of that number is tried in that dtype by every run of the tests, or on demand (heavy).

        A slow target tries each sample in one of its dtypes, of two by the parity of the number's bits: where samples
        are the product of options, that is half of the factorial design in which every two options still meet in each
        dtype. Of the samples of attention, a second and more each, it tries every third in dtypes by turns, beginning
        anew every 28: loops of two, three, four and five options are met at another place each time
        (tests/test_triton.py counts what the slice has).
        """
        if not self.slow:
            return True
        if operator.node.endswith("attention"):
            block, place = divmod(sample, 28)
            return place % 3 == 0 and dtype == self.dtypes[(block + place // 3) % len(self.dtypes)]
        return dtype == self.dtypes[sample.bit_count() % len(self.dtypes)]

    @property
    def gradient_factor(self) -> float:
        """The law's for gradients. Kernels built without fused multiply-adds round every product, too; PyTorch, the
        measure, does not where the processor has them."""
        unfused = self.backend == "cpu" and registry.report()["cpu_isa"] == "generic"
        return GRADIENT + unfused

    def has(self, operator: Operator) -> bool:
        kernels = importlib.import_module(f"llmengine.backends.{self.backend}").KERNELS
        return operator.nodes() <= set(kernels) and operator.node not in self.partial


def targets() -> list[Target]:
    """The GPU where there is one; Triton kernels on CPU tensors where TRITON_INTERPRET is set (its interpreter
    computes bfloat16 wrongly)."""
    gpu = (torch.float32, torch.bfloat16, torch.float16)
    on_gpu = torch.cuda.is_available()
    hopper = on_gpu and torch.cuda.get_device_capability() == (9, 0)
    interpreted = Target("triton", "cpu", (torch.float32, torch.float16), slow=True)
    found = [
        Target("cpu", "cpu", (torch.float32, torch.bfloat16)),
        Target("triton", "cuda", gpu, slow=True) if on_gpu else interpreted,
        Target("cuda", "cuda", gpu, partial=HALVES_ONLY if hopper else HALVES_ONLY + HOPPER_ONLY),
        Target("cuda_sim", "cpu", gpu, prepare=simulator.prepare, partial=HALVES_ONLY),
    ]
    return [t for t in found if t.prepare or registry.load(t.backend).unavailable is None]
