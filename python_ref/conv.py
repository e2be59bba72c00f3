# SPDX-License-Identifier: Apache-2.0
"""Convolution over time, height and width that keeps the size, and its gradient: what ``fft_conv3d`` means."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .merging import _wide


def fft_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve as ``torch.nn.functional.conv3d`` does, with as many zeros around x as keep its size.

    Args:
        x: ``(B, C, T, H, W)`` floating.
        weight: ``(O, C, kt, kh, kw)`` with odd kt, kh and kw.
        bias: ``(O,)`` or None.

    Returns:
        ``(B, O, T, H, W)`` in x's dtype.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.conv3d(x, weight, bias, padding=_padding(weight)).contiguous()


def fft_conv3d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (in its dtype), weight and bias (in float32, float64 for float64), where ``needed``;
    empty ones in place of the others."""
    wide = _wide(x.dtype)
    found = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), [weight.shape[0]], [1] * 3, _padding(weight), [1] * 3, False, [0] * 3, 1,
        list(needed),
    )  # fmt: skip
    dtypes = (x.dtype, wide, wide)
    return tuple(  # type: ignore[return-value]
        t.to(dtype).contiguous() if want else x.new_empty(0, dtype=dtype)
        for t, want, dtype in zip(found, needed, dtypes, strict=True)
    )


def _padding(weight: Tensor) -> list[int]:
    return [k // 2 for k in weight.shape[2:]]
