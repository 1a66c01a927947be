from __future__ import annotations

import itertools

import numpy as np

from llmengine.data.draws import Draws, Purpose

PLACES = list(itertools.product([0, 1, 2**63], [0, 1], [Purpose.CUT, Purpose.MASK], [0, 1, 2**40]))


def test_streams_differ_and_repeat():
    streams = [Draws(*place).uniform(8) for place in PLACES]
    assert len({stream.tobytes() for stream in streams}) == len(PLACES)
    for place, stream in zip(PLACES, streams, strict=True):
        np.testing.assert_array_equal(stream, Draws(*place).uniform(8))


def test_values_are_fixed():
    """A resumed run must see the same numbers with every NumPy: values of Philox 4x64-10 as its authors define it."""
    mask = 2**64 - 1

    def philox(key: list[int], counter: list[int]) -> list[int]:
        c, k = list(counter), list(key)
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        return c

    words = [word for block in (1, 2) for word in philox([7, 3], [block, 0, int(Purpose.MASK), 11])]
    np.testing.assert_array_equal(Draws(7, 3, Purpose.MASK, 11).uniform(8), [(word >> 11) / 2**53 for word in words])


def test_uniform_and_order():
    values = Draws(0, 0, Purpose.MASK).uniform(40_000)
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, 20, (0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000 * 0.95)
    order = Draws(0, 0, Purpose.ORDER).order(1000)
    assert sorted(order) == list(range(1000)) and list(order) != list(range(1000))
    firsts = np.bincount([Draws(0, epoch, Purpose.ORDER).order(5)[0] for epoch in range(5000)])
    assert np.abs(firsts - 1000).max() < 5 * np.sqrt(800)
