# SPDX-License-Identifier: Apache-2.0
"""The operator attention and its backward, and the same composed of torch's own function."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .._backends import choose
from ..layout import accumulator_dtype, empty_heads_last, heads_last, log_size_bias, unit_stride, with_prefix
from ..reference import AttentionInputs
from .library import autocasts, define, gradient, no_gradient

# -- composed ---------------------------------------------------------------------------------------------------------


def sdpa(inputs: AttentionInputs) -> Tensor:
    """Compute attention by ``F.scaled_dot_product_attention``: the prefix concatenated, the sizes as an additive
    mask."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
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


# -- attention --------------------------------------------------------------------------------------------------------


def _checked(
    q, k, v, size=None, prefix_k=None, prefix_v=None, scale=None, backend="auto"
) -> tuple[AttentionInputs, str]:
    """Check the operator's arguments; return them, and the backend's name."""
    inputs = AttentionInputs(q, k, v, size, prefix_k, prefix_v, scale)
    checks.attention(inputs, backend)
    return inputs, backend


def _attention(*arguments) -> tuple[Tensor, Tensor]:
    inputs, backend = _checked(*arguments)
    run = choose(backend, inputs.q, inputs)
    return run.attention(inputs) if inputs.q.numel() else _outputs(inputs.q)


def _attention_fake(*arguments) -> tuple[Tensor, Tensor]:
    return _outputs(_checked(*arguments)[0].q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
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


def _checked_backward(grad: Tensor, *arguments) -> tuple[AttentionInputs, Tensor, Tensor, str]:
    """Check the operator's arguments, which end with out, lse, scale and backend; return inputs, out, lse, backend."""
    *tensors, out, lse, scale, backend = arguments
    inputs = AttentionInputs(*tensors, scale)
    q = inputs.q
    checks.attention(inputs, backend)
    checks.saved_tensor(grad, "grad", tuple(q.shape), q.dtype, q.device)
    checks.saved_tensor(out, "out", tuple(q.shape), q.dtype, q.device)
    checks.saved_tensor(lse, "lse", tuple(q.shape[:3]), accumulator_dtype(q.dtype), q.device)
    return inputs, out, lse, backend


def _backward(grad: Tensor, *arguments) -> Gradients:
    inputs, out, lse, backend = _checked_backward(grad, *arguments)
    run = choose(backend, inputs.q, inputs)
    if inputs.q.numel() == 0:
        return tuple(t.zero_() for t in _gradients(inputs))  # type: ignore[return-value]
    *grads, dprefix_k, dprefix_v = run.attention_backward(grad, inputs, out, lse)
    if dprefix_k is None or dprefix_v is None:
        dprefix_k, dprefix_v = grad.new_empty(0), grad.new_empty(0)
    return *grads, dprefix_k, dprefix_v  # type: ignore[return-value]


def _backward_fake(grad: Tensor, *arguments) -> Gradients:
    return _gradients(_checked_backward(grad, *arguments)[0])


def _gradients(inputs: AttentionInputs) -> Gradients:
    dq, dk, dv = (empty_heads_last(x, *x.shape[:3]) for x in inputs[:3])
    prefix = (inputs.q.new_empty(0 if x is None else x.shape) for x in (inputs.prefix_k, inputs.prefix_v))
    return dq, dk, dv, *prefix  # type: ignore[return-value]


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
