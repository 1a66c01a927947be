"""What this machine can do, and how near each operator comes: the roofline of `llmengine bench`.

A case (`cases.py`) is a call of an operator and of its peers on equal tensors, with the bytes that it must move and the
operations that it must do. Two kinds of ceiling are measured first (`ceilings.py`): copying, and multiply-adds of each
dtype. The larger of bytes / copy rate and operations / multiply-add rate is the least time that a case can take, and a
time is told as a percentage of that (Williams, Waterman & Patterson, "Roofline", 2009).
"""

from llmengine.roofline.cases import OPERATORS, SHAPES, Case, cases
from llmengine.roofline.ceilings import NAMES, Ceilings, measure_ceilings
from llmengine.roofline.clock import Clock, keep_freed_memory
from llmengine.roofline.machine import machine, processor
from llmengine.roofline.measure import Row, lines, measure
from llmengine.roofline.plot import draw

__all__ = [
    "NAMES", "OPERATORS", "SHAPES", "Case", "Ceilings", "Clock", "Row", "cases", "draw", "keep_freed_memory", "lines",
    "machine", "measure", "measure_ceilings", "processor",
]  # fmt: skip
