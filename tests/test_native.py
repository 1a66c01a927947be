"""The native CPU module: instruction sets, threads, forks, the GIL, and arguments that no kernel may ever see."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_calls import CALLS, guarded, mutations, signature
from processes import OWN, SUITE, laws, printed, run_tests
from programs import compiled, printed_by

from llmengine import _cpu, functional

# ---- instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _cpu.supported_isas())
def test_laws_on_every_instruction_set(isa: str):
    assert printed("from llmengine import _cpu; print(_cpu.isa())", LLMENGINE_CPU_ISA=isa) == isa
    run_tests("test_ops.py", laws("test_errors_against_float64"), 280, LLMENGINE_CPU_ISA=isa)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", SUITE)
@pytest.mark.parametrize("isa", _cpu.supported_isas())
def test_all_of_the_operator_suite_on_every_instruction_set(isa: str, file: str):
    run_tests(file, OWN, 3500, LLMENGINE_CPU_ISA=isa)


@pytest.mark.parametrize(
    "isa",
    sorted({"generic", "avx2", "avx512", "avx512_rounding", "avx512_bf16", "amx", "sse9"} - set(_cpu.supported_isas())),
)
def test_an_instruction_set_that_is_missing_is_an_error(isa: str):
    script = """
import torch, llmengine
for _ in range(2):  # not only the first time
    try:
        llmengine.functional.softmax(torch.ones(2, 2), -1)
    except ValueError as error:
        print(error)
"""
    usable = ", ".join(_cpu.supported_isas())
    expected = f"LLMENGINE_CPU_ISA={isa} cannot be used; this machine and build have: {usable}"
    assert printed(script, LLMENGINE_CPU_ISA=isa).splitlines() == [expected] * 2


def test_the_best_instruction_set_is_the_default():
    *_, best = _cpu.supported_isas()
    facts = Path("/proc/cpuinfo")
    words = facts.read_text().split() if facts.exists() else []
    if best == "avx512_bf16" and "GenuineIntel" in words and "avx512_fp16" in words:  # csrc/cpu/isa.h says why
        best = "avx512_rounding"
    assert printed("from llmengine import _cpu; print(_cpu.isa())", LLMENGINE_CPU_ISA="") == best


def test_the_choice_on_other_machines(tmp_path: Path):
    """Above all one whose system refuses AMX's tiles."""
    sources = ["tests/csrc/isa_test.cpp", "csrc/cpu/isa.cpp"]
    assert printed_by(compiled(sources, tmp_path / "isa_test", [])) == "passed\n"


# ---- threads, forks, the GIL -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_what_its_parent_does():
    """libgomp's threads do not survive a fork: a parallel region in the child would wait for them for ever."""
    script = """
import os, sys, torch, llmengine
torch.set_num_threads(2)
x = torch.randn(512, 1024)
y = llmengine.functional.softmax(x, -1)
child = os.fork()
if child == 0:
    again = llmengine.functional.softmax(x, -1)
    torch.set_num_threads(1)  # PyTorch's own comparison would wait for the dead threads
    os._exit(0 if torch.equal(again, y) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert printed(script, timeout=60) == "0"


class Normalised(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return functional.layer_norm(torch.full((64, 768), float(index)) + torch.arange(768.0), (768,))


def test_operators_run_in_dataloader_workers():
    dataset = Normalised()
    here = torch.stack([dataset[i] for i in range(len(dataset))])
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2, timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), here, rtol=0, atol=0)


def softmax_of(seed: int) -> list[torch.Tensor]:
    return [functional.softmax(torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)), -1)]


def products_of(seed: int) -> list[torch.Tensor]:
    """Results and gradients of what keeps scratch memory between calls."""
    g = torch.Generator().manual_seed(seed)

    def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]

    x, up, down = leaves((150, 96), (200, 96), (96, 200))
    q, k, v = leaves(*[(1, 3, 150, 40)] * 3)
    h, w = leaves((200, 33), (901, 33))
    results = [
        functional.ffn(x, up, down),
        functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        functional.linear_cross_entropy(h, w, torch.arange(200)),
    ]
    return [*results, *torch.autograd.grad(sum(y.square().sum() for y in results), [x, up, down, q, k, v, h, w])]


@pytest.mark.parametrize("make, times", [(softmax_of, 30), (products_of, 4)])
def test_calls_from_many_python_threads(make, times):
    expected = [make(i) for i in range(6)]
    wrong: list[int] = []
    start = threading.Barrier(len(expected))

    def work(i: int) -> None:
        start.wait()
        for _ in range(times):
            if not all(map(torch.equal, make(i), expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(expected))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_torch_set_num_threads_is_honoured():
    script = """
import os, torch, llmengine
torch.set_num_threads(1)
x = torch.ones(4096, 256)
def threads(n):
    torch.set_num_threads(n)
    llmengine.functional.softmax(x, -1)
    return len(os.listdir("/proc/self/task"))
alone = threads(1)
print(threads(1) - alone, threads(3) - alone)
"""
    assert printed(script) == "0 2"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are told in /proc")
def test_small_calls_leave_the_threads_of_the_pool_alone():
    """libgomp ends the threads that a smaller team leaves over, PyTorch's too, and starts others for a larger one."""
    script = """
import os, torch, llmengine
torch.set_num_threads(8)
large, small = torch.randn(512, 1024), torch.randn(2, 9000)  # two threads' worth
seen = set()
def call():
    llmengine.functional.softmax(small, -1)
    torch.exp(large)
    seen.update(os.listdir("/proc/self/task"))
call()
before = len(seen)
for _ in range(100):
    call()
print(before >= 8, len(seen) - before)
"""
    assert printed(script) == "True 0"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="libraries are told in /proc")
def test_one_pool_serves_pytorch_and_the_kernels():
    script = """
import torch, llmengine
from llmengine import _cpu
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    assert printed(script) == "1"


def test_kernels_release_the_gil():
    """Another Python thread runs on while a kernel does: this one wakes many times within one long call."""
    x = torch.randn(3000, 8192)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    called = threading.Event()
    span: list[float] = []

    def work() -> None:
        output = torch.empty_like(x)
        began = time.perf_counter()
        called.set()
        for _ in range(5):
            _cpu.softmax_forward(input=x, output=output)
        span.append(time.perf_counter() - began)

    worker = threading.Thread(target=work)
    worker.start()
    called.wait()
    wakes = 0
    while not span:
        time.sleep(0.001)
        wakes += 1
    worker.join()
    torch.set_num_threads(threads)
    assert wakes >= 20, f"{wakes} wakes in {span[0]:.3f} s"


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({call.kernel for call in CALLS}))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_argument_crashes_a_kernel(name: str, data: st.DataObject):
    """A valid call with one or two arguments spoilt: a ValueError that names one of the arguments, or a call that is
    as good as any, and never a byte written outside the tensors given."""
    calls = [call for call in CALLS if call.kernel == name]
    call = data.draw(st.sampled_from(calls))
    spoilt = data.draw(st.lists(st.sampled_from(sorted(call.arguments)), min_size=1, max_size=2, unique=True))
    arguments = dict(call.arguments)
    for key in spoilt:
        arguments[key] = data.draw(mutations(arguments[key]))
    watched = {key: guarded(value) for key, value in arguments.items()}
    try:
        getattr(_cpu, name)(**{key: value for key, (value, _) in watched.items()})
    except ValueError as error:
        assert any(key in str(error) for key in arguments), f"names no argument: {error}"
    for key, (_, guards) in watched.items():
        assert all(guard.intact() for guard in guards), f"{name} wrote outside of {key}"


def test_every_kernel_is_fuzzed():
    bound = {name: signature(name) for name in dir(_cpu) if signature(name)}
    del bound["multiply_add_peak"]  # no operator: tests/roofline
    assert bound and bound.keys() == {call.kernel for call in CALLS}
    for call in CALLS:
        assert sorted(call.arguments) == sorted(bound[call.kernel])


@pytest.mark.parametrize(
    "spoilt, problem",
    [
        (lambda x: None, "softmax: input is required but None was given"),
        (lambda x: x.half(), "softmax: input has dtype float16; allowed: float32, bfloat16"),
        (lambda x: x.to(torch.complex64), "softmax_forward: input has an unsupported dtype"),
        (lambda x: x[0], r"softmax: input must be \(rows, columns\), got \(3,\)"),
        (lambda x: x.t().contiguous().t(), "softmax: input must have last stride 1, got 2"),
        (lambda x: x.reshape((1,) * 8 + (6,)), "softmax_forward: input has 9 dimensions; at most 8 are accepted"),
        (lambda x: x.to("meta"), "softmax_forward: input is no tensor in memory"),
        (lambda x: x.to_sparse(), "softmax_forward: input is no tensor in memory"),
    ],
)
def test_errors_name_the_argument(spoilt, problem: str):
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=problem):
        _cpu.softmax_forward(input=spoilt(x), output=torch.empty(2, 3))


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"softmax_forward: output must be a torch\.Tensor or None, got list"):
        _cpu.softmax_forward(input=torch.ones(1, 1), output=[1.0])


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"scale": "1"}, "embedding_forward: scale must be float, got str"),
        ({"scale": None}, "embedding_forward: scale must be float, got NoneType"),
        ({"weights": None}, "embedding_forward: has no argument weights"),
        ({"weight": ...}, "embedding_forward: argument weight is missing"),
    ],
)
def test_arguments_have_names_and_types(change: dict, problem: str):
    good = {
        "input": torch.zeros(1, dtype=torch.int64),
        "weight": torch.ones(2, 3),
        "scale": 2,
        "output": torch.empty(1, 3),
    }
    _cpu.embedding_forward(**dict(reversed(good.items())))
    _cpu.embedding_forward(**{"".join([*name]): value for name, value in good.items()})  # names made at run time
    assert good["output"].tolist() == [[2.0, 2.0, 2.0]]
    with pytest.raises(TypeError, match=f"^{problem}$"):
        _cpu.embedding_forward(**{k: v for k, v in (good | change).items() if v is not ...})
    with pytest.raises(TypeError, match="embedding_forward: takes keyword arguments alone"):
        _cpu.embedding_forward(*good.values())


class Duck:
    """A tensor of a PyTorch that has no DLPack exchange table: the bindings read its attributes."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape, self.dtype, self.device = tensor, tensor.shape, tensor.dtype, tensor.device
        self.stride, self.data_ptr = tensor.stride, tensor.data_ptr


def test_tensors_without_an_exchange_table():
    wide = torch.randn(5, 12)
    output, expected = torch.empty(5, 7), functional.softmax(wide[:, 2:9], -1)
    _cpu.softmax_forward(input=Duck(wide[:, 2:9]), output=Duck(output))
    assert torch.equal(output, expected)
    for spoilt, problem in (
        (wide.to("meta"), "input is on a device that this module does not serve: meta"),
        (wide.to(torch.complex64), "input has an unsupported dtype"),
        (wide.reshape((1,) * 8 + (60,)), "input has 9 dimensions"),
    ):
        with pytest.raises(ValueError, match=f"softmax_forward: {problem}"):
            _cpu.softmax_forward(input=Duck(spoilt), output=output)
