# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: the one place that chooses a backend and reads ``STOPTOME_BACKEND``.

Each backend is a module with ``match``, ``reduce`` and ``spread`` (see :mod:`stoptome_kernels.reference` for what they
compute) and ``why_not``, one predicate that serves the silent choice of ``auto`` and the error of an explicit backend.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from .. import checks
from . import native, reference, triton

_MODULES: dict[str, ModuleType] = {"triton": triton, "native": native, "reference": reference}  # best first


def choose(name: str, tensor: Tensor) -> ModuleType:
    """The module that runs an op on ``tensor``.

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
            if module.why_not(tensor.device.type, tensor.dtype, explicit=False) is None:
                return module
    if asked not in _MODULES:
        source = "backend" if asked == name else "the environment variable STOPTOME_BACKEND"
        raise ValueError(f"{source} must be one of {', '.join(map(repr, checks.BACKENDS))}, got {asked!r}")
    module = _MODULES[asked]
    reason = module.why_not(tensor.device.type, tensor.dtype, explicit=True)
    if reason is not None:
        source = f"backend={asked!r}" if asked == name else f"STOPTOME_BACKEND={asked}"
        raise RuntimeError(f"{source} can't run this: {reason}; backend='auto' takes one that can")
    return module


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run on this machine, else the reason why it can't."""
    return {
        "triton": triton.why_not("cuda" if torch.cuda.is_available() else "cpu", torch.float32, explicit=True),
        "native": native.why_not("cpu", torch.float32, explicit=True),
        "reference": None,
    }
