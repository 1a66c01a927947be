"""Loss and best tags of a conditional random field over packed sequences, beside the usual loop over time in PyTorch
(`plain`) and, where installed, pytorch-crf; both of these work on padded rows, which here have no padding."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import forward_backward

from llmengine import functional
from llmengine.testing.samples.chain_field import arguments, plain, plain_decode

# (sequences, length, K): CoNLL's entities, part-of-speech tags of longer texts
SHAPES = [(32, 64, 9), (64, 256, 45)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
INSTALLED = ["pytorch-crf"] if importlib.util.find_spec("torchcrf") else []
PEERS = pytest.mark.parametrize("peer", ["llmengine", "plain", *INSTALLED])
LOSSES = {"llmengine": functional.chain_field_loss, "plain": plain}
DECODERS = {"llmengine": functional.chain_field_decode, "plain": plain_decode}


def _arguments(shape, dtype):
    sequences, length, k = shape
    emissions, tags, *field, cu_seqlens = arguments(k, [length] * sequences)
    return emissions.to(dtype), tags, *(x.float() for x in field), cu_seqlens


def _pytorch_crf(transition, start, end):
    import torchcrf

    peer = torchcrf.CRF(len(start), batch_first=True)
    peer.transitions.data, peer.start_transitions.data, peer.end_transitions.data = transition, start, end
    return peer


@PEERS
@SHAPE
def bench_forward_backward(side_by_side, peer, dtype, shape):
    emissions, tags, transition, start, end, cu_seqlens = _arguments(shape, dtype)
    if peer == "pytorch-crf":
        crf = _pytorch_crf(transition, start, end)
        rows, right = emissions.float().view(shape), tags.view(shape[:2])
        leaves = [rows.requires_grad_(), *crf.parameters()]

        def call():
            torch.autograd.grad(-crf(rows, right), leaves)
    else:
        call = forward_backward(
            lambda x, t, s, e: LOSSES[peer](x, tags, t, s, e, cu_seqlens), emissions, transition, start, end
        )
    side_by_side(peer, {peer: call}, flops=6 * emissions.shape[0] * shape[2] ** 2)


@PEERS
@SHAPE
def bench_decode(side_by_side, peer, dtype, shape):
    emissions, _, transition, start, end, cu_seqlens = _arguments(shape, dtype)
    if peer == "pytorch-crf":
        crf, rows = _pytorch_crf(transition, start, end), emissions.float().view(shape)

        def call():
            crf.decode(rows)
    else:

        def call():
            DECODERS[peer](emissions, transition, start, end, cu_seqlens, return_scores=False)

    side_by_side(peer, {peer: call}, flops=2 * emissions.shape[0] * shape[2] ** 2)
