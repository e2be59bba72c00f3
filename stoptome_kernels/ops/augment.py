# SPDX-License-Identifier: Apache-2.0
"""The two-channel form of proportional attention: logarithms of sizes as channels of the keys, for kernels that take no
mask.

``scale · q kᵀ + log size`` is ``scale · q' k'ᵀ`` for ``q' = [q, c, c]`` and ``k' = [k, hi, lo]``, where ``hi + lo =
log(size) / (scale · c)`` in two parts of the dtype, whose rounding error is then squared. It is FlashBias (arXiv
2505.12044), which writes the bias of an attention as a product of low rank, for one of rank one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import accumulator_dtype
from ..reference import AttentionInputs, scale_of

_MOST_CHANNELS = 256  # of flash kernels
_MULTIPLE = 8  # of channels: rows are of 16 bytes
_SMALLEST, _LARGEST = 2.0**-14, 2.0**15  # powers of two that float16 has
_MOST_OFF = 16.0
# Half of what is subtracted from the score of a key of size 0, over scale · c; the largest float16. Not infinite, since
# kernels multiply it by gradients that are 0. Not larger in other dtypes: where it is all there is in a row, a kernel
# takes the exponential of its rounding error in float32.
_MASKED = 65504.0


def multiplier(scale: float) -> float | None:
    """Return c, the power of two next to ``1 / |scale|``; None if in float16 there is none near it.

    By comparisons alone, which a compiler takes for constants where scale is a symbol to it.
    """
    c, scale = 1.0, abs(scale)
    while c * scale < 2**-0.5 and c < _LARGEST:
        c *= 2
    while c * scale > 2**0.5 and c > _SMALLEST:
        c /= 2
    return c if 1 / _MOST_OFF <= c * scale <= _MOST_OFF else None


def takes(inputs: AttentionInputs) -> bool:
    """Return whether there are sizes, which can be channels of what a flash kernel takes."""
    if inputs.size is None or inputs.q.shape[3] + 2 > _MOST_CHANNELS:
        return False
    return multiplier(scale_of(inputs)) is not None


def augment_qk(q: Tensor, k: Tensor, size: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """Return q', k' and the scale of their products, see ``stoptome_kernels.augment_qk``.

    Raises:
        ValueError: the bias doesn't fit float16 at this scale.
    """
    c = multiplier(scale)
    if c is None:
        raise ValueError(
            f"scale must be from 2e-06 to 2.6e+05, or the negative of that, for sizes to be channels, got {scale}: "
            "multiply q by it and give scale=1.0, or take attention(..., backend='auto'), which takes a mask here"
        )
    if scale < 0:  # flash kernels take the largest product for the largest score
        q, scale = -q, -scale
    bias = size.detach().to(accumulator_dtype(k.dtype)).log() / (scale * c)
    high = bias.clamp(min=-_MASKED).to(k.dtype)
    low = (bias - high).clamp(min=-_MASKED).to(k.dtype)
    both = F.pad(torch.stack([high, low], -1), (0, _added(k) - 2))
    return _with_channels(q, q.new_full((), c)), _with_channels(k, both[:, :, None]), scale


def with_zeros(v: Tensor) -> Tensor:
    """Return values ``(N, H, T, d)`` with as many channels as ``augment_qk`` gives to keys."""
    return _with_channels(v, v.new_zeros(()))


def _added(x: Tensor) -> int:
    """Return the number of channels that are added to those of ``x``: 2, and more to a multiple."""
    return 2 + -(x.shape[-1] + 2) % _MULTIPLE


def _with_channels(x: Tensor, more: Tensor) -> Tensor:
    """Return ``x (N, H, T, d)`` with channels ``more``, which expand to ``(N, T, H, more)``, behind its own; the heads
    of a token next to each other in memory."""
    x = x.transpose(1, 2)
    return torch.cat([x, more.expand(*x.shape[:-1], _added(x))], -1).transpose(1, 2)
