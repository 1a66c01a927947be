"""Triton's interpreter, made fit for tests of numbers: products in one order, and half the time."""

from __future__ import annotations

import numpy as np


def prepare() -> None:
    """Changes Triton 3.7's interpreter in this process.

    tl.dot adds in double and rounds once. NumPy's float32 product adds in an order that depends on where an element
    lies in its tile; on a GPU the order is the same for all, and kernels may rely on equal terms to cancel.

    Device functions called within a launch do not patch triton.language again: the launch has done so, and looking
    for what else to patch takes half of the interpreter's time.

    Storages are not copied back after a launch: those of CPU tensors are where the kernel wrote, and copying one with
    a huge stride onto itself takes gigabytes.
    """
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    patched: set[int] = set()

    def call(self, *args, **kwargs):
        namespace = id(self.fn.__globals__)
        if namespace not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(namespace)
        return self.rewrite()(*args, **kwargs)

    launch = interpreter.GridExecutor.__call__

    def begin(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = begin
    interpreter.GridExecutor._restore_args_dev = lambda self, *_: None
