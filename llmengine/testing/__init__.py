"""What tests and benchmarks share: the tolerance law, sample cases per operator, memory layouts, NaN poison.

Not imported by ``import llmengine``.
"""

from __future__ import annotations

from llmengine.testing.law import assert_law, assert_near, poison
from llmengine.testing.layouts import LAYOUTS
from llmengine.testing.sample import Operator, Sample, all_operators, evaluate
from llmengine.testing.targets import Target, targets

__all__ = [
    "LAYOUTS",
    "Operator",
    "Sample",
    "Target",
    "all_operators",
    "assert_law",
    "assert_near",
    "evaluate",
    "poison",
    "targets",
]
