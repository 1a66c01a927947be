"""Oracles that nobody here wrote: PyTorch's OpInfo samples against PyTorch in float64, and ONNX's node cases.

Operators run as a user's would: the registry picks the backend. What lies outside of a public signature is skipped for
one of a few reasons, which are counted.
"""

from __future__ import annotations

import importlib
from collections import Counter
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from llmengine import functional
from llmengine.testing import Sample, assert_law, evaluate
from llmengine.testing.law import GRADIENT, OUTPUT

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.filterwarnings("ignore:llmengine. .* runs on the slow reference backend:UserWarning")


# ---- PyTorch's OpInfo ------------------------------------------------------------------------------------------------


def _embedding(weight, input, **options):
    """In OpInfo's order."""
    return functional.embedding(input, weight, **options)


# OpInfo: its function here, and how many samples must run
OPINFO = {
    ("nn.functional.layer_norm", ""): (functional.layer_norm, 5),
    ("nn.functional.rms_norm", ""): (functional.rms_norm, 5),
    ("softmax", ""): (functional.softmax, 7),
    ("softmax", "with_dtype"): (functional.softmax, 7),
    ("nn.functional.cross_entropy", ""): (functional.cross_entropy, 11),
    ("nn.functional.embedding", ""): (_embedding, 5),
    ("nn.functional.scaled_dot_product_attention", ""): (functional.scaled_dot_product_attention, 13),
}
INFOS = {(o.name, o.variant_test_name): o for o in op_db if (o.name, o.variant_test_name) in OPINFO}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", OPINFO, ids=lambda key: "-".join(filter(None, key)))
def test_opinfo_samples(key: tuple[str, str], dtype: torch.dtype):
    function, least = OPINFO[key]
    skipped: Counter[str] = Counter()
    ran = 0
    for i, given in enumerate(INFOS[key].sample_inputs("cpu", torch.float64)):
        reason = _outside(key[0], given)
        if reason:
            skipped[reason] += 1
            continue
        args = [_of_order_one(key[0], a) for a in (given.input, *given.args)]
        sample = Sample(f"{key[0]} {i}", tuple(args), given.kwargs, ("weight",)).rounded(dtype)
        oracle = evaluate(INFOS[key].op, sample.rounded(torch.float64), None)
        plain = evaluate(INFOS[key].op, sample, None)
        ours = evaluate(function, sample, None)
        for y, p, o in zip(ours[0], plain[0], oracle[0], strict=True):
            assert_law(y, p, o, OUTPUT, f"{sample.name} {dtype}: output")
        for k in ours[1]:
            assert_law(ours[1][k], plain[1][k], oracle[1][k], GRADIENT, f"{sample.name} {dtype}: grad {k}")
        ran += 1
    assert ran >= least, f"{ran} ran, skipped: {dict(skipped)}"


def _outside(name: str, given) -> str | None:
    if given.kwargs.get("dropout_p"):
        return "dropout"  # other random numbers
    if name == "nn.functional.cross_entropy" and given.args[0].is_floating_point():
        return "class probabilities"
    if name == "nn.functional.embedding" and given.kwargs.keys() & {"max_norm", "scale_grad_by_freq", "sparse"}:
        return "what embedding does not support"
    if given.kwargs.get("eps", 0.0) < 0:
        return "negative eps"  # a ValueError here
    return None


def _of_order_one(name: str, value):
    """OpInfo draws from [-9, 9]: scores so far apart that the gradients are nothing but cancelled roundings."""
    return value / 9 if "attention" in name and isinstance(value, torch.Tensor) else value


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def onnx_cases(stem: str, name: str) -> list[SimpleNamespace]:
    """The cases of an operator in ONNX's backend tests: made by ONNX's own formulas, in numpy."""
    helper = importlib.import_module("onnx.helper")
    module = importlib.import_module(f"onnx.backend.test.case.node.{stem}")
    cases = []

    def record(node, inputs, outputs, name, **_):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        named = {key: _tensor(value) for key, value in zip(filter(None, node.input), inputs, strict=True)}
        cases.append(SimpleNamespace(name=name, inputs=named, output=_tensor(outputs[0]), attributes=attributes))

    expect, module.expect = module.expect, record
    numpy.random.seed(0)
    try:
        for export in dir(getattr(module, name)):
            if export.startswith("export"):
                getattr(getattr(module, name), export)()
    finally:
        module.expect = expect
    return cases


def _tensor(value) -> torch.Tensor:
    value = numpy.asarray(value)
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.astype(numpy.float32)).to(torch.bfloat16)
    return torch.from_numpy(value.copy())


def check(case: SimpleNamespace, output: torch.Tensor) -> None:
    # ONNX's numbers are themselves rounded, in float32 or a 16-bit type
    tolerance = 4 * torch.finfo(case.output.dtype).eps if output.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(
        output.to(case.output.dtype),
        case.output,
        rtol=tolerance,
        atol=tolerance,
        msg=lambda text: f"{case.name}: {text}",
    )


def test_onnx_normalizations():
    cases = onnx_cases("layernormalization", "LayerNormalization")
    norms = onnx_cases("rmsnormalization", "RMSNormalization")
    for case in [*cases, *norms]:
        x, weight, *bias = case.inputs.values()
        axis, eps = case.attributes.get("axis", -1), case.attributes.get("epsilon", 1e-5)
        shape = x.shape[axis % x.ndim :]
        function = functional.layer_norm if case in cases else functional.rms_norm
        check(case, function(x, shape, weight, *bias, eps=eps))
    assert len(cases) >= 19 and len(norms) >= 19


def test_onnx_softmax():
    cases = onnx_cases("softmax", "Softmax")
    for case in cases:
        check(case, functional.softmax(case.inputs["x"], case.attributes.get("axis", -1)))
    assert len(cases) >= 7


def test_onnx_softmax_cross_entropy():
    cases = onnx_cases("softmax_cross_entropy_loss", "SoftmaxCrossEntropyLoss")
    for case in cases:
        x, target, *weight = case.inputs.values()
        options = {"ignore_index": case.attributes.get("ignore_index", -100)}
        options["reduction"] = case.attributes.get("reduction", b"mean").decode()
        check(case, functional.cross_entropy(x, target, *weight, **options))
    assert len(cases) >= 30


def test_onnx_attention():
    skipped: Counter[str] = Counter()
    cases = onnx_cases("attention", "Attention")
    for case in cases:
        reason = _outside_attention(case)
        if reason:
            skipped[reason] += 1
        else:
            check(case, _attention(case))
    assert len(cases) - skipped.total() >= 60, skipped


def _outside_attention(case: SimpleNamespace) -> str | None:
    inputs, attributes = case.inputs, case.attributes
    if "nonpad_kv_seqlen" in inputs:
        return "padded keys"  # here a mask, or varlen_attention
    if "past_key" in inputs and attributes.get("is_causal") and inputs["Q"].shape[-2] != inputs["K"].shape[-2]:
        return "causal past that is not aligned at the end"
    return None


def _attention(case: SimpleNamespace) -> torch.Tensor:
    inputs, attributes = case.inputs, case.attributes
    query, key, value = (inputs[name] for name in "QKV")
    packed = query.ndim == 3  # (batch, tokens, heads x head_dim)
    if packed:
        query = query.unflatten(-1, (attributes["q_num_heads"], -1)).transpose(1, 2)
        key, value = (t.unflatten(-1, (attributes["kv_num_heads"], -1)).transpose(1, 2) for t in (key, value))
    causal = None
    if attributes.get("is_causal"):
        causal = "bottom_right" if "past_key" in inputs else "top_left"
    if "past_key" in inputs:
        key, value = torch.cat([inputs["past_key"], key], 2), torch.cat([inputs["past_value"], value], 2)
    output = functional.scaled_dot_product_attention(
        query, key, value, inputs.get("attn_mask"), scale=attributes.get("scale"), enable_gqa=True, causal=causal,
        window_size=(attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)),
        softcap=attributes.get("softcap", 0.0),
    )  # fmt: skip
    return output.transpose(1, 2).flatten(2) if packed else output
