"""Memory of the native CPU module: what kernels keep between calls, what they do where there is none, and tensors of
more than 2^31 elements."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is told in /proc, and limited by RLIMIT_AS")

# product(mib): the gradient of a weight of so many tokens that its scratch takes so much, 384 floats of each on the
# generic path. Their rows all lie in one place, so that nothing else takes memory.
SETTING = """
import resource, torch
from llmengine import _cpu

torch.set_num_threads(1)
gradient, weight = torch.empty(8, 384), torch.ones(8, 384)

def told(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) << 10

def limit(beyond):
    resource.setrlimit(resource.RLIMIT_AS, (told("VmSize") + beyond if beyond else -1, -1))

def product(mib):
    tokens = mib * MIB // (384 * 4)
    gradient.fill_(-1)
    grad, x = torch.ones(1, 8).expand(tokens, 8), torch.ones(1, 384).expand(tokens, 384)
    _cpu.linear_backward(grad_output=grad, input=x, weight=weight, grad_input=None, grad_weight=gradient,
                         grad_bias=None, add_weight=False)
    assert (gradient == tokens).all()

MIB = 1 << 20
product(1)
"""


def printed(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SETTING + script], capture_output=True, text=True, timeout=240,
        env=os.environ | {"LLMENGINE_CPU_ISA": "generic"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@linux
def test_scratch_of_deep_products_is_given_back():
    script = """
before = told("VmRSS")
product(150)
print((told("VmHWM") - before) // MIB > 140, (told("VmRSS") - before) // MIB < 20)
"""
    assert printed(script) == "True True"


@linux
def test_memory_that_there_is_not_is_an_error_and_the_next_call_works():
    script = """
limit(16 * MIB)
try:
    product(50)
except MemoryError:
    print("none")
limit(0)
product(50)
"""
    assert printed(script) == "none"


@linux
def test_scratch_that_grows_is_given_back_before_it_is_taken():
    script = """
product(40)
limit(40 * MIB)  # beside what is kept there is no room for more
product(60)
print("enough")
"""
    assert printed(script) == "enough"


@linux
def test_results_that_no_memory_holds_are_errors():
    """Of tensors of 2^40 and 2^58 rows that are one element each, so that they take no memory themselves."""
    script = """
from llmengine import functional

def rows(*shape, dtype=torch.float32):
    return torch.ones((), dtype=dtype).expand(*shape)

one, calls = torch.ones, {
    "softmax": lambda n: functional.softmax(rows(n, 8), -1),
    "a wide row": lambda n: functional.softmax(rows(1, n), -1),
    "add_layer_norm": lambda n: functional.add_layer_norm(rows(n, 8), rows(n, 8), (8,)),
    "cross_entropy": lambda n: functional.cross_entropy(rows(n, 8), rows(n, dtype=torch.int64)),
    "queries": lambda n: functional.scaled_dot_product_attention(rows(1, 1, n, 8), *[one(1, 1, 4, 8)] * 2),
    "heads": lambda n: functional.scaled_dot_product_attention(*[rows(1, n, 4, 8)] * 3),
    "ffn": lambda n: functional.ffn(rows(n, 8), one(16, 8), one(8, 16)),
    "hidden": lambda n: functional.ffn(one(4, 8), rows(n, 8), rows(8, n)),
    "linear": lambda n: functional.linear(rows(n, 8, dtype=torch.bfloat16), one(16, 8).bfloat16()),
    "linear_cross_entropy": lambda n: functional.linear_cross_entropy(
        rows(n, 8), one(16, 8), rows(n, dtype=torch.int64)),
    "embedding": lambda n: functional.embedding(rows(n, dtype=torch.int64), one(16, 8)),
}
limit(1024 * MIB)
for name, call in calls.items():
    for n in (2**40, 2**58):
        try:
            call(n)
        except (MemoryError, RuntimeError) as error:  # PyTorch's allocator raises the latter
            assert any(word in str(error) for word in ("allocate", "overflow")), error
        else:
            raise AssertionError(name)
assert functional.softmax(one(2, 2), -1).tolist() == [[0.5, 0.5]] * 2
print("told")
"""
    assert printed(script) == "told"


@linux
@pytest.mark.heavy
def test_more_than_2_to_the_31_elements():
    """Of pages that nobody has touched, so that they take no memory."""
    script = """
import math
from llmengine import functional
n = 2**31 + 4099
x = torch.empty(n, dtype=torch.bfloat16)
x[-1], x[2**31 + 1] = 3, 4
norm = torch.empty(())
_cpu.gradient_norm(gradients=[x], norm=norm)
loss = functional.cross_entropy(x.view(1, n), torch.tensor([2**31 + 1]))
expected = math.log(n - 2 + math.exp(3) + math.exp(4)) - 4
print(norm.item(), abs(loss.item() - expected) < 1e-5, told("VmHWM") < 1 << 30)
"""
    assert printed(script) == "5.0 True True"
