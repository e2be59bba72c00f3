# SPDX-License-Identifier: Apache-2.0
"""The operator merge_norm (residual add, merge and LayerNorm) and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .._backends import choose
from ..layout import accumulator_dtype, empty_merged
from ..reference import Groups, MergedRows
from .library import define, gradient, no_gradient

# -- forward ----------------------------------------------------------------------------------------------------------


def check_merge_norm(
    x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> None:
    """Raise what is wrong with the arguments of merge_norm."""
    checks.rows(x, "x", groups, backend)
    checks.merge_norm(x, residual, weight, bias, eps)


def stream_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    """Return the dtype of x + residual: under autocast x is float32 and what a layer adds to it is not."""
    return torch.promote_types(x.dtype, residual.dtype)


def dispatch_tensor(x: Tensor, residual: Tensor) -> Tensor:
    """Return the one of the two that decides which backends can run."""
    return residual if residual.dtype == torch.float64 else x


def _checked(x, residual, members, offsets, size=None, weight=None, bias=None, eps=1e-5, backend="auto") -> tuple:
    """Check the operator's arguments; return those of ``Backend.merge_norm``, and the backend's name."""
    given = (x, residual, Groups(members, offsets, size), weight, bias, eps)
    check_merge_norm(*given, backend)
    return given, backend


def _merge_norm(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, backend = _checked(*arguments)
    return choose(backend, dispatch_tensor(*given[:2])).merge_norm(*given)


def _merge_norm_fake(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (x, residual, groups, *_), _ = _checked(*arguments)
    dtype = stream_dtype(x, residual)
    (y, size_out), wide = empty_merged(x, groups, dtype), accumulator_dtype(dtype)
    mean, rstd = (torch.empty_like(size_out, dtype=wide) for _ in range(2))
    return y, torch.empty_like(y), size_out, mean, rstd


define(
    "merge_norm(Tensor x, Tensor residual, Tensor members, Tensor offsets, Tensor? size=None, Tensor? weight=None,"
    " Tensor? bias=None, float eps=1e-05, str backend='auto') -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _merge_norm,
    _merge_norm_fake,
)


def layer_norm(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Apply LayerNorm over the last axis, in y's dtype; computed in float32 (float64 for float64) where it is given
    different dtypes, as PyTorch's own is in any case."""
    rows = y
    if any(t is not None and t.dtype != y.dtype for t in (weight, bias)):
        wide = accumulator_dtype(y.dtype)
        rows, weight, bias = y.to(wide), *(None if t is None else t.to(wide) for t in (weight, bias))
    # autocast may compute it in another dtype
    return torch.nn.functional.layer_norm(rows, y.shape[-1:], weight, bias, eps).to(y.dtype)


# -- backward ---------------------------------------------------------------------------------------------------------


def _checked_backward(grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, affine, backend) -> tuple:
    """Check the operator's arguments; return those of ``Backend.merge_norm_backward``, and the backend's name."""
    groups = Groups(members, offsets, size)
    checks.rows(grad_normed, "grad_normed", groups, backend, merged=True)
    shape, dtype, device = tuple(grad_normed.shape), grad_normed.dtype, grad_normed.device
    checks.saved_tensor(grad_y, "grad_y", shape, dtype, device)
    checks.saved_tensor(y, "y", shape, dtype, device)
    checks.saved_tensor(mean, "mean", shape[:2], accumulator_dtype(dtype), device)
    checks.saved_tensor(rstd, "rstd", shape[:2], accumulator_dtype(dtype), device)
    checks.affine(weight, "weight", grad_normed)
    return (grad_normed, grad_y, MergedRows(y, mean, rstd), groups, weight, affine), backend


def _backward(*arguments) -> tuple[Tensor, Tensor]:
    given, backend = _checked_backward(*arguments)
    return choose(backend, given[0]).merge_norm_backward(*given)


def _backward_fake(*arguments) -> tuple[Tensor, Tensor]:
    (grad, _, _, groups, _, affine), _ = _checked_backward(*arguments)
    n, tokens, dim = grad.shape[0], groups.members.shape[1], grad.shape[2]
    sums = grad.new_empty(2 if affine else 0, dim, dtype=accumulator_dtype(grad.dtype))
    return grad.new_empty(n, tokens, dim), sums


# the gradients of weight and bias come as the rows of one tensor, in the wide type: one sum over the parts for both
define(
    "merge_norm_backward(Tensor grad_normed, Tensor? grad_y, Tensor y, Tensor mean, Tensor rstd, Tensor members,"
    " Tensor offsets, Tensor? size, Tensor? weight, bool affine, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output) -> None:
    x, residual, members, offsets, size, weight, bias, _, ctx.backend = inputs
    y, _, size_out, mean, rstd = output
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.affine_dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
    # neither x nor residual: y is all that the gradient of the norm asks for
    ctx.save_for_backward(y, mean, rstd, members, offsets, size, weight)
    ctx.mark_non_differentiable(size_out, mean, rstd)
    ctx.set_materialize_grads(False)


def _grad(ctx, grad_y, grad_normed, *_):
    if grad_y is None and grad_normed is None:
        return (None,) * 9
    y, mean, rstd, members, offsets, size, weight = ctx.saved_tensors
    sums: tuple[Tensor | None, ...] = (None, None)
    if grad_normed is None:  # the merge alone
        grad = torch.ops.stoptome.merge_backward(grad_y, members, offsets, size, None, None, "mean", ctx.backend)
    else:
        # PyTorch leaves out trailing arguments that have their defaults, a bias of None among them
        wanted = (*ctx.needs_input_grad[5:7], False, False)[:2]
        grad, affine = torch.ops.stoptome.merge_norm_backward(
            grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, any(wanted), ctx.backend
        )
        sums = tuple(
            affine[row].to(dtype) if needed else None
            for row, (needed, dtype) in enumerate(zip(wanted, ctx.affine_dtypes, strict=True))
        )
    grads = (
        grad.to(dtype) if needed else None for needed, dtype in zip(ctx.needs_input_grad, ctx.dtypes, strict=False)
    )
    return (*grads, None, None, None, *sums, None, None)


gradient("merge_norm", _grad, _save)
no_gradient(
    "merge_norm_backward",
    "merge_norm has no second derivative; use merge and torch.nn.functional.layer_norm where one is needed",
)
