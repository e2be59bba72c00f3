# SPDX-License-Identifier: Apache-2.0
"""The fallback: plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import (
    attention,
    fft_conv3d,
    fft_conv3d_backward,
    match,
    merge_norm,
    merge_norm_backward,
    spread,
)

__all__ = [
    "attention",
    "attention_backward",
    "fft_conv3d",
    "fft_conv3d_backward",
    "match",
    "merge_norm",
    "merge_norm_backward",
    "reduce",
    "spread",
    "unavailable_reason",
]


def unavailable_reason(device: str, dtype: torch.dtype, explicit: bool) -> str | None:
    """Return None: the reference always runs."""
    return None


def reduce(
    x: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    mode: str,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``stoptome_kernels.reference.reduce``; ``out`` is where to write."""
    y, size_out = reference.reduce(x, members, offsets, size, mode)
    return (y, size_out) if out is None else (out[0].copy_(y), out[1].copy_(size_out))


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See ``stoptome_kernels.reference.attention_backward``; it needs neither ``out`` nor ``lse``."""
    return reference.attention_backward(grad, q, k, v, size, prefix_k, prefix_v, scale)
