# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the one place that chooses a backend and reads ``STOPTOME_BACKEND``.

A backend is a ``contract.Backend``. Its ``unavailable_reason`` serves the silent choice of ``auto`` and the error of an
explicit backend, which never falls back. This folder is not called ``backends``, as the public function is.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..checks import AUGMENTED
from ..reference import AttentionInputs
from .contract import Backend
from .native import Native
from .reference import Reference
from .triton import Triton

TRITON, NATIVE, REFERENCE = Triton(), Native(), Reference()
BACKENDS: dict[str, Backend] = {run.name: run for run in (TRITON, NATIVE, REFERENCE)}  # best first


def _asked(name: str) -> str:
    return os.environ.get("STOPTOME_BACKEND") or "auto" if name == "auto" else name


def choose(name: str, tensor: Tensor, inputs: AttentionInputs | None = None) -> Backend:
    """Return the backend that runs an operator on ``tensor``.

    Args:
        name: name of a backend, which is taken at its word; ``auto`` for the one that ``STOPTOME_BACKEND`` names, or
            else the best that can run.
        tensor: tensor whose device and dtype must be supported.
        inputs: arguments of attention, if that is the operator.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend asked for can't run here.
    """
    # to name a type of device costs as much as all the rest here
    asked, device, dtype = _asked(name), "cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype
    if asked == "auto":
        for run in BACKENDS.values():
            if run.unavailable_reason(device, dtype, explicit=False) is None and (
                inputs is None or run.unsupported_attention(inputs) is None
            ):
                return run
    if asked not in BACKENDS:
        source = "backend" if asked == name else "the environment variable STOPTOME_BACKEND"
        raise ValueError(f"{source} must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {asked!r}")
    run = BACKENDS[asked]
    reason = run.unavailable_reason(device, dtype, explicit=True)
    if reason is None and inputs is not None:
        reason = run.unsupported_attention(inputs)
    if reason is not None:
        source = f"backend={asked!r}" if asked == name else f"STOPTOME_BACKEND={asked}"
        raise RuntimeError(f"{source} can't run this: {reason}; backend='auto' takes one that can")
    return run


def choose_attention(
    name: str, device: str, dtype: torch.dtype, triton: bool, native: bool, augmented: bool, plain: bool
) -> str:
    """Return who computes attention: ``sdpa``, torch's own function; ``augmented``, the same with the sizes as
    channels; ``reference``; or ``operator``, one of its backends.

    Torch's function is taken for plain attention and where no kernel of ours can run. Called as it is, rather than
    inside the operator, the compiler sees into it. Constant in a traced graph: it depends on the machine and on the
    environment.

    Args:
        name: name of a backend, ``auto`` or ``augmented``, which no environment variable may name: other operators have
            no such form.
        device: type of device.
        dtype: dtype of queries, keys and values.
        triton: whether the Triton kernels are for these shapes.
        native: whether the native kernel is for this call.
        augmented: whether there are sizes, which can be channels.
        plain: whether there are neither sizes nor a prefix.
    """
    if name == AUGMENTED:
        return name
    name = _asked(name)
    if name == "auto":
        ours = triton and TRITON.unavailable_reason(device, dtype, explicit=False) is None
        ours = ours or (native and NATIVE.unavailable_reason(device, dtype, explicit=False) is None)
        if ours and not plain:
            return "operator"
        # no flash kernel takes float32, nor a mask but a CPU's
        flash = device != "cpu" and dtype in (torch.bfloat16, torch.float16)
        return AUGMENTED if augmented and flash else "sdpa"
    if name == "native" and NATIVE.unavailable_reason(device, dtype, explicit=True) is None:
        return "operator" if native and not plain else "sdpa"
    return "reference" if name == "reference" else "operator"  # which tells why it can't run, if it can't


# what torch.compiler.assume_constant_result does, without its importing the compiler, and Triton with it
choose_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backends() -> dict[str, str | None]:
    """Return every backend by name, with None if it can run on this machine, else the reason why it can't."""
    found = {}
    for name, run in BACKENDS.items():
        here = (d for d in run.devices if d == "cpu" or torch.get_device_module(d).is_available())
        found[name] = run.unavailable_reason(next(here, run.devices[0]), torch.float32, explicit=True)
    return found
