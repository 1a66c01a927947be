"""What tests and benchmarks share: the tolerance law, sample cases per operator, memory layouts, NaN poison,
the backends to test.

Not imported by ``import llmengine``.
"""

from __future__ import annotations

from llmengine.testing.backends import BackendUnderTest, backends_under_test
from llmengine.testing.law import assert_law, assert_near, poison
from llmengine.testing.layouts import LAYOUTS
from llmengine.testing.sample import Operator, Sample, all_operators, evaluate

__all__ = [
    "LAYOUTS", "BackendUnderTest", "Operator", "Sample", "all_operators", "assert_law", "assert_near",
    "backends_under_test", "evaluate", "poison",
]  # fmt: skip
