# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the one place that chooses a backend and reads ``STOPTOME_BACKEND``.

Each backend is a module with ``match``, ``reduce``, ``spread`` and ``merge_norm`` (see ``stoptome_kernels.reference``
for what they compute) and ``unavailable_reason``, one predicate that serves the silent choice of ``auto`` and the error
of an explicit backend.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from .. import checks
from . import native, reference, triton

_MODULES: dict[str, ModuleType] = {"triton": triton, "native": native, "reference": reference}  # best first


def choose(name: str, tensor: Tensor, unsupported: str | None = None) -> ModuleType:
    """Return the module that runs an operator on ``tensor``; ``unsupported`` is why the Triton kernels cannot take its
    shape, or None.

    ``auto`` means the backend named by ``STOPTOME_BACKEND``, else the best that can run; any other name is taken at
    its word.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend asked for can't run here.
    """
    asked = name
    if name == "auto":
        asked = os.environ.get("STOPTOME_BACKEND") or "auto"
    if asked == "auto":
        for module in _MODULES.values():
            if module is triton and unsupported is not None:
                continue
            if module.unavailable_reason(tensor.device.type, tensor.dtype, explicit=False) is None:
                return module
    if asked not in _MODULES:
        source = "backend" if asked == name else "the environment variable STOPTOME_BACKEND"
        raise ValueError(f"{source} must be one of {', '.join(map(repr, checks.BACKENDS))}, got {asked!r}")
    module = _MODULES[asked]
    reason = module.unavailable_reason(tensor.device.type, tensor.dtype, explicit=True)
    if reason is None and module is triton:
        reason = unsupported
    if reason is not None:
        source = f"backend={asked!r}" if asked == name else f"STOPTOME_BACKEND={asked}"
        raise RuntimeError(f"{source} can't run this: {reason}; backend='auto' takes one that can")
    return module


def choose_attention(name: str, device: str, dtype: torch.dtype, fits: bool, plain: bool) -> str:
    """Return who computes attention: ``sdpa``, torch's own function, ``reference``, or ``operator``, one of its
    backends.

    Torch's function is the best there is for plain attention (no sizes, no prefix), on a CPU, and where no kernel of
    ours can run: ``fits`` says whether the shape is one for them. Called as it is, rather than inside the operator, its
    gradient saves copies and the compiler sees into it. Constant in a traced graph: it depends on the machine and on
    the environment.
    """
    if name == "auto":
        name = os.environ.get("STOPTOME_BACKEND") or "auto"
    if name == "auto":
        return (
            "operator"
            if fits and not plain and triton.unavailable_reason(device, dtype, explicit=False) is None
            else "sdpa"
        )
    if name == "native" and native.unavailable_reason(device, dtype, explicit=True) is None:
        return "sdpa"
    return "reference" if name == "reference" else "operator"  # which tells why it can't run, if it can't


# what torch.compiler.assume_constant_result does, without its importing the compiler, and Triton with it
choose_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backends() -> dict[str, str | None]:
    """Return every backend by name, with None if it can run on this machine, else the reason why it can't."""
    return {
        "triton": triton.unavailable_reason(
            "cuda" if torch.cuda.is_available() else "cpu", torch.float32, explicit=True
        ),
        "native": native.unavailable_reason("cpu", torch.float32, explicit=True),
        "reference": None,
    }
