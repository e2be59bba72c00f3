# SPDX-License-Identifier: Apache-2.0
"""The operator attention and its backward, and the same composed of torch's own function."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, dispatch
from ..layout import accumulator_dtype, empty_heads_last, heads_last, log_size_bias, unit_stride, with_prefix
from .library import autocasts, define, gradient, no_gradient

# -- composed ---------------------------------------------------------------------------------------------------------


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Compute attention by ``F.scaled_dot_product_attention``: the prefix concatenated, the sizes as an additive
    mask."""
    k, v = with_prefix(prefix_k, k), with_prefix(prefix_v, v)
    bias = log_size_bias(size, k)
    if bias is not None and q.device.type != "cpu":
        bias = bias.to(q.dtype)  # the fused kernels for GPUs take a mask in q's dtype alone
    # autocast would round the logarithms to 8 bits
    exact = torch.autocast(q.device.type, enabled=False) if autocasts(q.device.type) else nullcontext()
    with exact:
        out = F.scaled_dot_product_attention(
            unit_stride(q), unit_stride(k), unit_stride(v), attn_mask=bias, scale=scale
        )
    return heads_last(out)


def default_scale(q: Tensor) -> float:
    """Return ``1 / sqrt(head_dim)``."""
    return q.shape[-1] ** -0.5


def limit(q: Tensor, k: Tensor, prefix_k: Tensor | None) -> str | None:
    """Return why the Triton kernels can't take tensors of this shape, or None."""
    return dispatch.triton.unsupported_attention(
        k.shape[2] + (0 if prefix_k is None else prefix_k.shape[2]), q.shape[3]
    )


# -- attention --------------------------------------------------------------------------------------------------------


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    checks.attention(q, k, v, size, prefix_k, prefix_v, scale, backend)
    run = dispatch.choose(backend, q, limit(q, k, prefix_k))
    if q.numel() == 0:
        return _attention_fake(q, k, v, size, prefix_k, prefix_v, scale, backend)
    return run.attention(q, k, v, size, prefix_k, prefix_v, default_scale(q) if scale is None else scale)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    checks.attention(q, k, v, size, prefix_k, prefix_v, scale, backend)
    n, heads, queries, _ = q.shape
    return empty_heads_last(q, n, heads, queries), q.new_empty((n, heads, queries), dtype=accumulator_dtype(q.dtype))


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? size=None, Tensor? prefix_k=None, Tensor? prefix_v=None,"
    " float? scale=None, str backend='auto') -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)

# -- backward ---------------------------------------------------------------------------------------------------------

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    backend: str,
) -> Gradients:
    _check_backward(grad, q, k, v, size, prefix_k, prefix_v, out, lse, scale, backend)
    run = dispatch.choose(backend, q, limit(q, k, prefix_k))
    if q.numel() == 0:
        return tuple(t.zero_() for t in _like(q, k, v, prefix_k, prefix_v))  # type: ignore[return-value]
    scale = default_scale(q) if scale is None else scale
    *grads, dprefix_k, dprefix_v = run.attention_backward(grad, q, k, v, size, prefix_k, prefix_v, out, lse, scale)
    if dprefix_k is None:
        dprefix_k, dprefix_v = q.new_empty(0), q.new_empty(0)
    return *grads, dprefix_k, dprefix_v


def _backward_fake(grad, q, k, v, size, prefix_k, prefix_v, out, lse, scale, backend) -> Gradients:
    _check_backward(grad, q, k, v, size, prefix_k, prefix_v, out, lse, scale, backend)
    return _like(q, k, v, prefix_k, prefix_v)


def _like(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None) -> Gradients:
    dq, dk, dv = (empty_heads_last(x, *x.shape[:3]) for x in (q, k, v))
    prefix = (q.new_empty(0 if x is None else x.shape) for x in (prefix_k, prefix_v))
    return dq, dk, dv, *prefix  # type: ignore[return-value]


def _check_backward(grad, q, k, v, size, prefix_k, prefix_v, out, lse, scale, backend) -> None:
    checks.attention(q, k, v, size, prefix_k, prefix_v, scale, backend)
    checks.saved_tensor(grad, "grad", tuple(q.shape), q.dtype, q.device)
    checks.saved_tensor(out, "out", tuple(q.shape), q.dtype, q.device)
    checks.saved_tensor(lse, "lse", tuple(q.shape[:3]), accumulator_dtype(q.dtype), q.device)


# the gradients of a prefix that is not there are empty: an operator returns the same number of tensors in any case
define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? size, Tensor? prefix_k, Tensor? prefix_v,"
    " Tensor out, Tensor lse, float? scale, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output) -> None:
    q, k, v, size, prefix_k, prefix_v, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, size, prefix_k, prefix_v, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _grad(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 8
    *saved, out, lse = ctx.saved_tensors
    dq, dk, dv, dprefix_k, dprefix_v = torch.ops.stoptome.attention_backward(
        grad, *saved, out, lse, ctx.scale, ctx.backend
    )
    prefix = (None, None) if saved[4] is None else (dprefix_k, dprefix_v)
    return dq, dk, dv, None, *prefix, None, None


gradient("attention", _grad, _save)
no_gradient(
    "attention_backward",
    "attention has no second derivative here; backend='reference' has one",
)
