"""Streams of random numbers: what each is for, and PyTorch's seeds of them."""

from __future__ import annotations

import numpy
import torch

INITIAL_WEIGHTS, TRAINING_STEP, EMBEDDING_NOISE, ADVERSARIAL_NOISE = range(4)


def seed_of(seed: int, *stream: int) -> int:
    """A seed for one of PyTorch's generators: a function of these numbers alone."""
    return int(numpy.random.SeedSequence((seed, *stream)).generate_state(1, numpy.uint64)[0])


def reseed(seed: int, *stream: int) -> None:
    """Seeds PyTorch's generators, which dropout draws from, by numbers alone: a step replays its draws anywhere."""
    torch.manual_seed(seed_of(seed, *stream))
