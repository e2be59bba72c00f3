# SPDX-License-Identifier: Apache-2.0
"""Residual add, merge and LayerNorm of the merged stream: Bolya et al., ICLR 2023 ("Tracking Token Size") for the
merge, Ba et al., *Layer Normalization* (arXiv 1607.06450), for what follows it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .merging import Groups, _wide, reduce, spread


class MergedRows(NamedTuple):
    """Results of ``merge_norm`` that its gradient needs.

    Attributes:
        y: ``(N, T_out, D)``, as ``merge_norm`` gives it.
        mean, rstd: ``(N, T_out)``, mean and reciprocal deviation of each row, float32 (float64 for float64).
    """

    y: Tensor
    mean: Tensor
    rstd: Tensor


def merge_norm(
    x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Merge x + residual and normalise what comes out.

    Args:
        x, residual: ``(N, T, D)`` floating; the stream's dtype is what the two promote to.
        groups: as in ``reduce``.
        weight, bias: ``(D,)`` or None.
        eps: added to the variance.

    Returns:
        y ``(N, T_out, D)``: the weighted means of x + residual, whose sum is not rounded to the stream's dtype before
        y is; normed ``(N, T_out, D)``: ``(y − mean) · rstd · weight + bias`` of y as rounded, both in the stream's
        dtype; size_out ``(N, T_out)`` float32; mean and rstd of the rows ``(N, T_out)`` in float32 (float64 for
        float64), as everything is computed.
    """
    stream = torch.promote_types(x.dtype, residual.dtype)
    wide = _wide(stream)
    y, size_out = reduce(x.to(wide) + residual.to(wide), groups, "mean")
    y = y.to(stream)
    rows = y.to(wide)
    mean = rows.mean(-1, keepdim=True)
    centered = rows - mean
    rstd = 1 / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    normed = centered * rstd
    if weight is not None:
        normed = normed * weight.to(wide)
    if bias is not None:
        normed = normed + bias.to(wide)
    return y, normed.to(stream), size_out, mean.squeeze(-1), rstd.squeeze(-1)


def merge_norm_backward(
    grad_normed: Tensor, grad_y: Tensor | None, rows: MergedRows, groups: Groups, weight: Tensor | None, affine: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``merge_norm`` from those of normed and y, ``(N, T_out, D)``.

    Returns:
        The gradient of x and of residual ``(N, T, D)`` in the stream's dtype, rounded once: with x̂ the rows normalised
        and u = grad_normed · weight, a merged row gets ``g = grad_y + rstd · (u − mean(u) − x̂ · mean(u · x̂))`` and a
        member i of it ``s_i / Σ s · g``. And the gradients of weight and bias, ``(2, D)`` in float32 (float64), or
        ``(0, D)`` if not ``affine``.
    """
    wide = _wide(grad_normed.dtype)
    given = grad_normed.to(wide).contiguous()  # the order of sums would be that of the strides
    rstd = rows.rstd[..., None]
    normalised = (rows.y.to(wide) - rows.mean[..., None]) * rstd
    up = given if weight is None else given * weight.to(wide)
    slope = (up * normalised).mean(-1, keepdim=True)
    grad = (up - up.mean(-1, keepdim=True) - normalised * slope) * rstd
    if grad_y is not None:
        grad = grad + grad_y.to(wide)
    grad_x = spread(grad, groups, "mean").to(grad_normed.dtype)
    if not affine:
        return grad_x, given.new_empty(0, given.shape[2])
    return grad_x, torch.stack([(given * normalised).sum((0, 1)), given.sum((0, 1))])
