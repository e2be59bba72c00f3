# SPDX-License-Identifier: Apache-2.0
"""Launches that are prepared once: what Triton decides from the arguments of a call is decided for all like it.

``kernel[grid](…)`` looks at every argument, builds a key of what it finds, and looks a compiled kernel up; that takes
longer than most of these kernels run at small batches. Here the caller has a key already, and Triton's own
``CompiledKernel`` launches. What is set in Triton for all kernels (debug, instrumentation) counts when a launch is
prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

# Triton passes constants to its launcher, too, since 3.3; that this is so was read in 3.6 and 3.9
_PREPARES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
_MOST = 4096  # launches that are remembered: a model has some dozens for each shape of its inputs
_READY: dict[tuple, tuple[Any, tuple[int, ...], tuple]] = {}


def launch(
    key: tuple, tensors: tuple[Tensor | None, ...], describe: Callable[..., tuple | list], *given: object
) -> None:
    """Launch a kernel on the current device.

    Args:
        key: all that decides what is launched, and with which numbers, but the addresses of the tensors: the
            operation, dtypes, shapes and strides, device, and which tensors there are.
        tensors: the arguments that the kernel begins with; all others are numbers.
        describe: function that returns (kernel, grid, arguments, constants and options), or a list of that alone;
            arguments begin with ``tensors``. It is not called for a key that is known, and addresses as before.
        given: its arguments.
    """
    address = 0
    for tensor in tensors:
        if tensor is not None:
            address |= tensor.data_ptr()
    # a kernel is compiled for addresses that are multiples of 16, or for any
    ready = _READY.get(key) if address % 16 == 0 else None
    if ready is not None:
        kernel, grid, numbers = ready
        kernel[grid](*tensors, *numbers)
        return
    described = describe(*given)
    kernel, grid, arguments, meta = described[0] if isinstance(described, list) else described
    compiled = kernel[grid](*arguments, **meta)
    if address % 16 or not _PREPARES or type(compiled) is not triton.compiler.CompiledKernel:
        return  # the interpreter, too
    if len(_READY) >= _MOST:
        forget()
    rest = kernel.arg_names[len(arguments) :]
    numbers = (*arguments[len(tensors) :], *(meta[name] for name in rest))
    _READY[key] = compiled, (*grid, 1, 1)[:3], numbers


def forget() -> None:
    """Forget all launches, so that the next ones are looked at by Triton."""
    _READY.clear()
