"""Implementations of the operators: reference (plain PyTorch, the oracle) and cpu (C++).

A backend is a module or package here with `unavailable() -> str | None` (why nothing of it can run on this machine) and
`KERNELS`, a table from operator name to `llmengine.ops.registry.Kernel`, one file per operator.
"""
