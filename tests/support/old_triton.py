# SPDX-License-Identifier: Apache-2.0
"""Mends for the interpreter of Triton 3.2, the oldest that is promised; later ones need none."""

import numpy as np
from triton import language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Replace the parts that are wrong; change nothing where the interpreter is a later one."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "get_int1_ty"):
        return
    store = builder.create_masked_store

    def ones(self, kind):
        dtype = interpreter._get_np_dtype(kind)
        value = dtype.kind == "b" or (np.iinfo(dtype).max if dtype.kind == "u" else -1)
        return interpreter.TensorHandle(np.full(1, value, dtype), kind.scalar)

    def store_as_declared(self, pointers, value, mask, *options):
        # numpy sums int32 to int64, whose upper half would go to the next element
        value = interpreter.TensorHandle(value.data.astype(interpreter._get_np_dtype(value.dtype)), value.dtype)
        return store(self, pointers, value, mask, *options)

    builder.get_int1_ty = lambda self: tl.int1  # without it no mask can be negated
    builder.get_all_ones_value = ones
    builder.create_masked_store = store_as_declared
