# SPDX-License-Identifier: Apache-2.0
"""The operator merge_norm (residual add, merge and LayerNorm) and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, dispatch
from ..layout import accumulator_dtype
from .library import define, gradient, no_gradient

# -- forward ----------------------------------------------------------------------------------------------------------


def check_merge_norm(
    x: Tensor,
    residual: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> None:
    """Raise what is wrong with the arguments of merge_norm."""
    checks.rows(x, "x", members.shape[1], members, offsets, backend)
    checks.size(size, members)
    checks.merge_norm(x, residual, weight, bias, eps)


def stream_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    """Return the dtype of x + residual: under autocast x is float32 and what a layer adds to it is not."""
    return torch.promote_types(x.dtype, residual.dtype)


def dispatch_tensor(x: Tensor, residual: Tensor) -> Tensor:
    """Return the one of the two that decides which backends can run."""
    return residual if residual.dtype == torch.float64 else x


def _merge_norm(
    x: Tensor,
    residual: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_merge_norm(x, residual, members, offsets, size, weight, bias, eps, backend)
    run = dispatch.choose(backend, dispatch_tensor(x, residual))
    return run.merge_norm(x, residual, members, offsets, size, weight, bias, eps)


def _merge_norm_fake(
    x: Tensor,
    residual: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_merge_norm(x, residual, members, offsets, size, weight, bias, eps, backend)
    n, out, dim, dtype = x.shape[0], offsets.shape[1] - 1, x.shape[2], stream_dtype(x, residual)
    rows = (x.new_empty(n, out, dim, dtype=dtype) for _ in range(2))
    numbers = (
        x.new_empty(n, out, dtype=kind) for kind in (torch.float32, accumulator_dtype(dtype), accumulator_dtype(dtype))
    )
    return (*rows, *numbers)  # type: ignore[return-value]


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


def _check_backward(grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, backend: str) -> None:
    checks.rows(grad_normed, "grad_normed", offsets.shape[1] - 1, members, offsets, backend)
    shape, dtype, device = tuple(grad_normed.shape), grad_normed.dtype, grad_normed.device
    checks.saved_tensor(grad_y, "grad_y", shape, dtype, device)
    checks.saved_tensor(y, "y", shape, dtype, device)
    checks.saved_tensor(mean, "mean", shape[:2], accumulator_dtype(dtype), device)
    checks.saved_tensor(rstd, "rstd", shape[:2], accumulator_dtype(dtype), device)
    checks.size(size, members)
    checks.affine(weight, "weight", grad_normed)


def _backward(
    grad_normed: Tensor,
    grad_y: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    affine: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, backend)
    run = dispatch.choose(backend, grad_normed)
    return run.merge_norm_backward(grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, affine)


def _backward_fake(grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, affine, backend):
    _check_backward(grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, backend)
    n, tokens, dim = grad_normed.shape[0], members.shape[1], grad_normed.shape[2]
    return (
        grad_normed.new_empty(n, tokens, dim),
        grad_normed.new_empty(2 if affine else 0, dim, dtype=accumulator_dtype(grad_normed.dtype)),
    )


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
