# SPDX-License-Identifier: Apache-2.0
"""The operator attention and its backward, and the same composed of torch's own function."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .._backends import NATIVE, TRITON, choose, choose_attention
from ..layout import accumulator_dtype, empty_heads_last, heads_last, log_size_bias, unit_stride, with_prefix
from ..reference import AttentionInputs, scale_of
from . import augment, direct
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


def augmented(inputs: AttentionInputs) -> Tensor:
    """Compute the same with the sizes as channels of the keys, see ``augment``: without a mask, for flash kernels."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
    if size is None:
        return sdpa(inputs)
    k, v = with_prefix(prefix_k, k), with_prefix(prefix_v, v)
    if prefix_k is not None:
        size = F.pad(size, (k.shape[2] - size.shape[1], 0), value=1.0)
    q, k, scale = augment.augment_qk(q, k, size, scale_of(inputs))
    out = F.scaled_dot_product_attention(q, k, augment.with_zeros(v), scale=scale)[..., : v.shape[3]]
    # keys that are all masked alike share the weight; to drop it costs no pass, since a slice is copied anyway
    something = (size != 0).any(1)[:, None, None, None]
    return heads_last((out.transpose(1, 2) * something).transpose(1, 2))


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
    dq, dk, dv, dprefix_k, dprefix_v = run.attention_backward(grad, inputs, out, lse)
    if dprefix_k is None or dprefix_v is None:
        dprefix_k, dprefix_v = grad.new_empty(0), grad.new_empty(0)
    return heads_last(dq), heads_last(dk), heads_last(dv), dprefix_k, dprefix_v  # as a trace expects them


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
    q, k, v, size, prefix_k, prefix_v, out, lse = ctx.saved_tensors
    dq, dk, dv, dprefix_k, dprefix_v = _call_backward(
        grad, q, k, v, size, prefix_k, prefix_v, out, lse, ctx.scale, ctx.backend
    )
    prefix = (None, None) if prefix_k is None else (dprefix_k, dprefix_v)
    return dq, dk, dv, None, *prefix, None, None


def _call_backward(grad, q, k, v, size, prefix_k, prefix_v, out, lse, scale, backend):
    """Call the operator, past the dispatcher where nobody would see it."""
    tensors = (q, k, v, size, prefix_k, prefix_v, out, lse)
    inputs = AttentionInputs(q, k, v, size, prefix_k, prefix_v, scale)
    device = direct.device_if_unseen(grad)
    # whoever saved tensors may give back others: hooks on them, or new data behind a tensor
    if (
        device
        and direct.are_on(device, q, out, lse)
        and _are_right(inputs, device)
        and direct.are_like(q, grad, out)
        and lse.shape == q.shape[:3]
        and lse.dtype == accumulator_dtype(q.dtype)
        and lse.device == q.device
        and not direct.needs_gradient(grad, *tensors)
    ):
        return choose(backend, q, inputs).attention_backward(grad, inputs, out, lse)
    return torch.ops.stoptome.attention_backward(grad, *tensors, scale, backend)


gradient("attention", _grad, _save)
no_gradient(
    "attention_backward",
    "attention has no second derivative here; backend='reference' has one",
)

# -- past the dispatcher ----------------------------------------------------------------------------------------------


def _run(*arguments) -> tuple[Tensor, Tensor]:
    *tensors, backend = arguments
    inputs = AttentionInputs(*tensors)
    return choose(backend, inputs.q, inputs).attention(inputs)


_differentiable = direct.function("attention", _run, _grad, _save)


def native_takes(inputs: AttentionInputs) -> bool:
    """Return whether the native kernel is to attend where ``auto`` or ``native`` is asked for. Where a gradient is
    wanted, now or when a checkpoint runs this again, torch's own function does, which is as often differentiable as its
    backends are; so it does in a trace or a mode and for a subclass, which may know how to count, shard or export
    it."""
    q, k, v, size, prefix_k, prefix_v, _ = inputs
    return (
        direct.is_eager()
        and not direct.has_function_modes()
        and direct.are_on("cpu", q, k, v)
        and direct.are_none_or_on("cpu", size, prefix_k, prefix_v)
        and _is_inference(inputs)
        and NATIVE.takes(inputs)
    )


def _is_inference(inputs: AttentionInputs) -> bool:
    """Return whether no gradient is wanted, now or when a checkpoint runs this again, which must give the same bits: a
    reentrant one's first pass is the forward of an autograd.Function, in which forward mode is off, too."""
    q, k, v, _, prefix_k, prefix_v, _ = inputs
    if torch.is_grad_enabled():
        return not direct.needs_gradient(q, k, v, prefix_k, prefix_v)
    return torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled()


def attention_directly(inputs: AttentionInputs, backend: str) -> Tensor | None:
    """Attend past the dispatcher, see ``direct``; None where the operator has to be called, or autocast to cast."""
    q, k, v, size, prefix_k, prefix_v, _ = inputs
    device = direct.device_if_unseen(q)
    if device is None or not (backend in checks.BACKENDS or backend == checks.AUGMENTED):
        return None
    if not _are_right(inputs, device):
        return None
    if torch.is_autocast_enabled(device) and q.dtype != torch.get_autocast_dtype(device):
        return None
    plain, native = size is None and prefix_k is None, _is_inference(inputs) and NATIVE.takes(inputs)
    channels = device != "cpu" and augment.takes(inputs)
    how = choose_attention(backend, device, q.dtype, TRITON.takes(inputs), native, channels, plain)
    if how == "sdpa":
        return sdpa(inputs)
    if how == checks.AUGMENTED:
        return augmented(inputs)
    if how == "reference":
        return None
    if direct.needs_gradient(q, k, v, prefix_k, prefix_v):
        size = None if size is None else size.detach()
        return _differentiable(q, k, v, size, *inputs[4:], backend)[0]
    return choose(backend, q, inputs).attention_inference(inputs)


def _are_right(inputs: AttentionInputs, device: str) -> bool:
    """Return whether the arguments of attention are right at first sight; ``device_of`` has said where q is."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
    if not direct.are_on(device, k, v) or not direct.are_none_or_on(device, size, prefix_k, prefix_v):
        return False
    shape, keys, dtype, here = q.shape, k.shape, q.dtype, q.device
    if len(shape) != 4 or len(keys) != 4 or 0 in shape or 0 in keys or dtype not in direct.FLOATING:
        return False
    n, heads, _, channels = shape
    if keys[0] != n or keys[1] != heads or keys[3] != channels or not direct.are_like(k, v):
        return False
    if k.dtype != dtype or k.device != here:
        return False
    if scale is not None and (type(scale) is not float or not math.isfinite(scale)):
        return False
    if size is not None and not direct.are_sizes(size, n, keys[2], here):
        return False
    if prefix_k is None or prefix_v is None:
        return prefix_k is prefix_v
    ahead = prefix_k.shape
    if len(ahead) != 4 or 0 in ahead or n % ahead[0] or ahead[1] != heads or ahead[3] != channels:
        return False
    return direct.are_like(prefix_k, prefix_v) and prefix_k.dtype == dtype and prefix_k.device == here
