"""The linear layer's own products, with their backward, beside nn.functional's: projections of GPT-2 and of a wider
layer, on both sides of the number of rows from which `functional.linear` chooses ours."""

from __future__ import annotations

import pytest
import torch
from conftest import forward_backward
from torch.nn import functional as torch_functional

from llmengine.functional.linear import products

CALLS = {"llmengine": products, "torch": torch_functional.linear}


@pytest.mark.parametrize("peer", list(CALLS))
@pytest.mark.parametrize("width, out", [(768, 768), (768, 2304), (1536, 1536)])
@pytest.mark.parametrize("tokens", [256, 1024, 2048])
def bench_forward_backward(side_by_side, peer, dtype, tokens, width, out):
    tensors = [torch.randn(tokens, width), torch.randn(out, width) / width**0.5, torch.randn(out)]
    call = forward_backward(CALLS[peer], *(t.to(dtype) for t in tensors))
    side_by_side(peer, {peer: call}, flops=6.0 * tokens * width * out)
