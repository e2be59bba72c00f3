# SPDX-License-Identifier: Apache-2.0
"""The operator merge_norm (residual add, merge and LayerNorm) and its backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from .._backends import choose
from ..layout import accumulator_dtype, empty_merged
from ..plan import MergePlan
from ..reference import Groups, MergedRows, cap_r
from . import direct
from .library import define, gradient, no_gradient
from .match_merge import merge_backward

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
        grad = merge_backward(grad_y, members, offsets, size, None, None, "mean", ctx.backend)
    else:
        # PyTorch leaves out trailing arguments that have their defaults, a bias of None among them
        wanted = (*ctx.needs_input_grad[5:7], False, False)[:2]
        grad, affine = _call_backward(
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


def _call_backward(grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, affine, backend):
    """Call the operator, past the dispatcher where nobody would see it."""
    tensors = (grad_y, y, mean, rstd, members, offsets, size, weight)
    device = direct.device_if_unseen(grad_normed)
    # whoever saved tensors may give back others: hooks on them, or new data behind a tensor
    if (
        device
        and direct.is_mergeable(grad_normed, members, offsets, size, device, merged=True)
        and _saved_fit(grad_normed, grad_y, y, mean, rstd, weight, device)
        and not direct.needs_gradient(grad_normed, *tensors)
    ):
        rows, groups = MergedRows(y, mean, rstd), Groups(members, offsets, size)
        return choose(backend, grad_normed).merge_norm_backward(grad_normed, grad_y, rows, groups, weight, affine)
    return torch.ops.stoptome.merge_norm_backward(grad_normed, *tensors, affine, backend)


def _saved_fit(grad, grad_y, y, mean, rstd, weight, device: str) -> bool:
    """Return whether what was saved fits the gradient."""
    if not direct.are_on(device, y, mean, rstd) or not direct.are_none_or_on(device, grad_y, weight):
        return False
    rows, here = grad.shape[:2], grad.device
    return (
        direct.are_like(grad, grad_y, y)
        and mean.shape == rows
        and mean.dtype == accumulator_dtype(grad.dtype)
        and mean.device == here
        and direct.are_like(mean, rstd)
        and (weight is None or _is_parameter(weight, grad.shape[2:], here))
    )


gradient("merge_norm", _grad, _save)
no_gradient(
    "merge_norm_backward",
    "merge_norm has no second derivative; use merge and torch.nn.functional.layer_norm where one is needed",
)

# -- past the dispatcher ----------------------------------------------------------------------------------------------


def _run(x, residual, members, offsets, size, weight, bias, eps, backend) -> tuple[Tensor, ...]:
    run = choose(backend, dispatch_tensor(x, residual))
    return run.merge_norm(x, residual, Groups(members, offsets, size), weight, bias, eps)


_differentiable = direct.function("merge_norm", _run, _grad, _save)


def merge_norm_directly(
    x: Tensor,
    residual: Tensor,
    plan: MergePlan,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute y, normed and size_out past the dispatcher, see ``direct``; None where the operator has to be called, or
    plan merges nothing."""
    device = direct.device_if_unseen(x)
    if device is None or backend not in checks.BACKENDS or not direct.is_plan(plan, device):
        return None
    if not direct.is_mergeable(x, plan.members, plan.offsets, size, device):
        return None
    if not _fit(x, residual, weight, bias, eps, device):
        return None
    if direct.needs_gradient(x, residual, weight, bias):
        size = None if size is None else size.detach()
        return _differentiable(x, residual, plan.members, plan.offsets, size, weight, bias, eps, backend)[:3]
    run = choose(backend, dispatch_tensor(x, residual))
    return run.merge_norm_inference(x, residual, Groups(plan.members, plan.offsets, size), weight, bias, eps)


def match_merge_norm_directly(
    metric: Tensor,
    r: int,
    protected: int,
    x: Tensor,
    residual: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None:
    """Match and compute merge_norm past the dispatcher, see ``direct``: (dest, members, offsets) and (y, normed, size).
    None where the operators have to be called, where there is a gradient, or if nothing is merged."""
    device = direct.device_if_unseen(x) if type(r) is int and type(protected) is int else None
    if device is None or not direct.are_on(device, metric) or not direct.are_none_or_on(device, size):
        return None
    rows, here = x.shape, x.device
    if len(rows) != 3 or 0 in rows or x.dtype not in direct.FLOATING:
        return None
    if not direct.is_metric(metric, rows[0], rows[1]) or metric.device != here:
        return None
    if not _fit(x, residual, weight, bias, eps, device) or direct.needs_gradient(x, residual, weight, bias):
        return None
    if size is not None and not direct.are_sizes(size, rows[0], rows[1], here):
        return None
    r = cap_r(r, rows[1], protected) if 0 <= protected <= rows[1] < 2**31 else 0
    if r < 1:
        return None
    run = choose("auto", dispatch_tensor(x, residual))
    match = run.match if metric.dtype == x.dtype == residual.dtype else choose("auto", metric).match
    plan = match(direct.by_heads(metric), r, protected)
    return plan, run.merge_norm_inference(x, residual, Groups(plan[1], plan[2], size), weight, bias, eps)


def _fit(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, device: str) -> bool:
    """Return whether what merge_norm takes besides x, plan and sizes is right at first sight."""
    if type(eps) is not float or not 0 < eps < math.inf or not direct.are_on(device, residual):
        return False
    shape, here = x.shape, x.device
    if residual.shape != shape or residual.dtype not in direct.FLOATING or residual.device != here:
        return False
    for parameter in (weight, bias):
        if parameter is not None and not (
            direct.are_on(device, parameter) and _is_parameter(parameter, shape[2:], here)
        ):
            return False
    return True


def _is_parameter(x: Tensor, shape: torch.Size, here: torch.device) -> bool:
    """Return whether LayerNorm can take a parameter; ``are_on`` is asked before."""
    return x.shape == shape and x.dtype in direct.FLOATING and x.device == here
