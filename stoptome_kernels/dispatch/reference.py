# SPDX-License-Identifier: Apache-2.0
"""The fallback: plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import match, spread

__all__ = ["match", "reduce", "spread", "why_not"]


def why_not(device: str, dtype: torch.dtype, explicit: bool) -> str | None:
    """It always can."""
    return None


def reduce(
    x: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    mode: str,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`stoptome_kernels.reference.reduce`; ``out`` is where to write."""
    y, size_out = reference.reduce(x, members, offsets, size, mode)
    return (y, size_out) if out is None else (out[0].copy_(y), out[1].copy_(size_out))
