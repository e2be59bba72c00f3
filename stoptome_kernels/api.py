# SPDX-License-Identifier: Apache-2.0
"""The public functions: match, merge, unmerge, merge_norm, attention, augment_qk, fft_conv3d."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import checks, onnx, ops, reference
from ._backends import TRITON, choose, choose_attention
from .plan import MergePlan


def match(
    metric: Tensor,
    r: int,
    protected: int | None = None,
    backend: str = "auto",
    *,
    sets: tuple[Tensor | Iterable[int], Tensor | Iterable[int]] | None = None,
) -> MergePlan:
    """Choose ``r`` tokens of every item and the tokens they are merged into (bipartite soft matching).

    Each token with an even index (source) proposes its most similar token with an odd index (destination), by cosine
    similarity of ``metric``, the lowest index on a tie. The r proposals of highest similarity are carried out, the
    lowest proposer on a tie. The output order is: protected tokens, unmerged even tokens, all odd tokens, each
    ascending. With ``r = 0`` no token moves. ``sets`` replaces the even and the odd tokens by given ones.

    Args:
        metric: ``(N, T, C)`` or ``(N, H, T, C)``, float32, float64, bfloat16 or float16, any strides; the mean over
            heads is taken inside. No gradient flows into it.
        r: tokens to remove from each item; capped at ``(T - protected) // 2``, or at the number of sources.
        protected: number of leading tokens that are neither sources nor destinations (class token, prompts); 1 if not
            given.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.
        sets: ``(sources, destinations)`` instead of ``protected``: disjoint token indices, shared by all items, in any
            order; 1-D int32 or int64 tensors on metric's device, or lists of ints. Tokens in neither set are unchanged
            and come first in the output. A source merges into one destination, a destination takes any number of
            sources. Without destinations nothing is merged.

    Returns:
        A ``MergePlan`` on metric's device; its ``protected`` is 0 with ``sets``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or range; the message names it.
        RuntimeError: an explicit backend can't run here; the message says why.

    Arithmetic is in float32 (float64 for float64), never tf32. The same input gives the same plan bit for bit. A token
    of norm 0 has similarity 0 to all others. A token with a NaN or an infinity is never matched; if too few others are
    left, it is removed with weight 0.

    Indices in lists and in CPU tensors are checked; those on a GPU are not, since this would synchronise with the
    device. Invalid sets on a GPU (out of range, overlapping, duplicates) are not detected; the plan is then meaningless
    but never out of bounds: an index is clamped to the valid range, a token in both sets is a destination, and a
    duplicate counts once, the rest of its set being filled with its neighbours in the order of the output.

    Source: Bolya et al., ICLR 2023, section 3; TempMe (Shen et al., ICLR 2025) for several protected tokens.
    """
    if sets is None:
        found = ops.match_merge.match_directly(metric, r, 1 if protected is None else protected, backend)
        if found is not None:
            return MergePlan(*found, 1 if protected is None else protected)
    checks.tensor(metric, "metric", "(N, T, C) or (N, H, T, C)")
    r = checks.count(r, "r", "tokens to remove from each item")
    if sets is not None:
        return _match_sets(metric, r, protected, backend, sets)
    protected = checks.count(1 if protected is None else protected, "protected", "leading tokens that are never merged")
    checks.choice(backend, "backend", checks.BACKENDS)
    checks.no_vmap_or_jvp(metric, "metric")
    if onnx.is_onnx_exporting():
        checks.match(metric, r, protected, backend)
        return MergePlan(*onnx.match(metric, r, protected), protected)
    dest, members, offsets = torch.ops.stoptome.match(metric.detach(), r, protected, backend)
    return MergePlan(dest, members, offsets, protected)


def _match_sets(metric: Tensor, r: int, protected: int | None, backend: str, sets: object) -> MergePlan:
    if protected is not None:
        raise ValueError(
            f"protected can't be given together with sets, got {protected!r}: tokens in neither set are protected"
        )
    if not isinstance(sets, (tuple, list)) or len(sets) != 2:
        raise TypeError(f"sets must be a pair (sources, destinations), got {type(sets).__name__}")
    checks.choice(backend, "backend", checks.BACKENDS)
    checks.no_vmap_or_jvp(metric, "metric")
    src, dst = (checks.index(index, f"sets[{k}]", metric) for k, index in enumerate(sets))
    if onnx.is_onnx_exporting():
        raise NotImplementedError("match with sets can't be exported to ONNX: leave that layer out of the export")
    dest, members, offsets = torch.ops.stoptome.match_sets(metric.detach(), r, src, dst, backend)
    return MergePlan(dest, members, offsets, 0)


def merge(
    x: Tensor,
    plan: MergePlan,
    size: Tensor | None = None,
    mode: str = "mean",
    backend: str = "auto",
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the tokens of ``x`` by ``plan``.

    Args:
        x: ``(N, T, D)``, float32, float64, bfloat16 or float16, any strides.
        plan: result of ``match``.
        size: ``(N, T)`` float32, number of original tokens that each token represents (positive); None means all ones.
            No gradient flows into it.
        mode: ``mean`` weighted by size, ``sum`` (unweighted) or ``max`` (elementwise; NaN if a member is NaN).
        backend: ``auto``, ``triton``, ``native`` or ``reference``.
        out: ``(y, size)``, contiguous tensors to write the results to, not overlapping x. For inference, where
            allocating memory can cost more than the merge itself (page faults on a CPU).

    Returns:
        ``y (N, T - r, D)`` in x's dtype and ``size (N, T - r)`` float32. Sums are computed in float32 (float64 for
        float64) in ascending token order: the result is the same bit for bit from run to run. A token that nothing was
        merged into is copied bit for bit. For a plan with r = 0, ``x`` and ``size`` themselves are returned.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device; the message names it.
        IndexError: a plan on the CPU does not contain each token exactly once. A plan on a GPU is not checked, since
            this would synchronise with the device: nothing outside of an item is read or written, and the gradient of a
            token in no group is NaN (with the ``reference`` backend, that of the whole item).
        RuntimeError: an explicit backend can't run here, or ``out`` was given although x needs a gradient.

    Twice differentiable in x, in reverse mode; forward mode and vmap raise. The gradient of ``max`` goes to the
    lowest token that reaches the maximum.

    Source: Bolya et al., ICLR 2023, "Tracking Token Size".
    """
    done = ops.match_merge.merge_directly(x, plan, size, mode, backend) if out is None else None
    if done is not None:
        return done
    checks.tensor(x, "x", "(N, T, D)")
    _check_plan(plan)
    checks.no_vmap_or_jvp(x, "x")
    if size is not None:
        checks.tensor(size, "size", "(N, T)")
    checks.choice(mode, "mode", checks.MODES)
    if out is not None:
        return _merge_into(x, plan, size, mode, backend, out)
    if plan.r == 0:  # an op may not return its input, and there is nothing to compute
        ops.match_merge.check_merge(x, plan._groups(size), mode, backend)
        _check_backend(backend, x)
        return x, torch.ones_like(plan.dest, dtype=torch.float32) if size is None else size
    size = None if size is None else size.detach()
    if onnx.is_onnx_exporting():
        ops.match_merge.check_merge(x, plan._groups(size), mode, backend)
        return onnx.merge(x, plan.dest, plan._weightless(), plan.tokens_out, size, mode)
    return torch.ops.stoptome.merge(x, plan.members, plan.offsets, size, mode, backend)


def _merge_into(
    x: Tensor, plan: MergePlan, size: Tensor | None, mode: str, backend: str, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out must be a pair (y, size) of tensors, got {type(out).__name__}")
    y, size_out = out
    checks.tensor(y, "out[0]", "(N, T - r, D)")
    checks.tensor(size_out, "out[1]", "(N, T - r)")
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        raise RuntimeError("out=... can't be differentiated: call merge under torch.no_grad(), or without out")
    torch.ops.stoptome.merge_out(
        x, plan.members, plan.offsets, None if size is None else size.detach(), mode, backend, y, size_out
    )
    return y, size_out


def unmerge(y: Tensor, plan: MergePlan, backend: str = "auto") -> Tensor:
    """Copy merged rows back to all original tokens: ``x̂_i = y_dest(i)``, the row of the token that i was merged into.

    Args:
        y: ``(N, tokens_out, D)``, float32, float64, bfloat16 or float16, any strides.
        plan: plan (or composed plan) that produced y's tokens.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``(N, tokens_in, D)`` in y's dtype. For a plan with r = 0, ``y`` itself.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device; the message names it.
        IndexError: a plan on the CPU does not contain each token exactly once. A plan on a GPU is not checked, since
            this would synchronise with the device: nothing outside of an item is read or written, and the row of a
            token in no group is NaN (with the ``reference`` backend, the whole item).
        RuntimeError: an explicit backend can't run here; the message says why.

    Twice differentiable in y; the gradient is the sum over the tokens of each group, in ascending order.
    """
    done = ops.match_merge.unmerge_directly(y, plan, backend)
    if done is not None:
        return done
    checks.tensor(y, "y", "(N, tokens_out, D)")
    _check_plan(plan)
    checks.no_vmap_or_jvp(y, "y")
    if plan.r == 0:
        ops.match_merge.check_unmerge(y, plan._groups(), backend)
        _check_backend(backend, y)
        return y
    if onnx.is_onnx_exporting():
        ops.match_merge.check_unmerge(y, plan._groups(), backend)
        return onnx.unmerge(y, plan.dest)
    return torch.ops.stoptome.unmerge(y, plan.members, plan.offsets, backend)


def merge_norm(
    x: Tensor,
    residual: Tensor,
    plan: MergePlan,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Add ``residual`` to the stream ``x``, merge the tokens by ``plan``, and apply LayerNorm to the result.

    This is the step of a pre-norm block between attention and MLP, in one pass over the rows. Equivalent to
    ``y, size = merge(x + residual, plan, size)`` and ``normed = layer_norm(y, (D,), weight, bias, eps)``, except that
    x + residual is not rounded to the stream's dtype.

    Args:
        x: ``(N, T, D)``, D ≥ 1, float32, float64, bfloat16 or float16, any strides.
        residual: ``(N, T, D)``, any of these dtypes, output of a layer that is added to x. The dtype of the stream is
            ``torch.promote_types(x.dtype, residual.dtype)`` (under autocast x is float32 and residual bfloat16).
        plan: result of ``match``.
        size: ``(N, T)`` float32, number of original tokens that each token represents (positive); None means all ones.
            No gradient flows into it.
        weight: ``(D,)``, any of these dtypes (float32 is usual with a 16-bit stream); None means all ones.
        bias: ``(D,)``, any of these dtypes; None means zeros.
        eps: value added to the variance; positive and finite.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``y (N, T - r, D)``, the merged stream, and ``normed (N, T - r, D)``, both in the stream's dtype; and
        ``size (N, T - r)`` float32. An output token is ``Σ s (x + residual) / Σ s`` over its members. All sums are
        computed in float32 (float64 for a float64 stream), in ascending token order, and rounded once. A token that
        nothing was merged into is ``x + residual``; tokens of weight 0 (see ``match``) are left out. normed is the
        LayerNorm of the rounded y: ``(y − mean) / sqrt(var + eps) · weight + bias`` with the biased variance in two
        passes. y is the same bit for bit on every backend, normed up to the order of its sums; both are the same bit
        for bit from run to run and for any number of threads. For a plan with r = 0: ``x + residual``, its layer_norm
        (computed in float32 if dtypes differ), and ``size`` unchanged.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range; the message names it.
        IndexError: the plan is damaged, see ``merge``.
        RuntimeError: an explicit backend can't run here; the message says why.

    Once differentiable in x, residual (which get the same gradient), weight and bias, in reverse mode: a second
    derivative through ``normed`` raises NotImplementedError. Saved for backward are y and two numbers per row, neither
    x nor residual. Gradients are deterministic; those of weight and bias are sums over fixed blocks of rows.

    Source: Bolya et al., ICLR 2023, "Tracking Token Size"; Ba et al., Layer Normalization, 2016.
    """
    done = ops.merge_norm.merge_norm_directly(x, residual, plan, size, weight, bias, eps, backend)
    if done is not None:
        return done
    checks.tensor(x, "x", "(N, T, D)")
    checks.tensor(residual, "residual", "(N, T, D)")
    _check_plan(plan)
    for value, name, shape in ((size, "size", "(N, T)"), (weight, "weight", "(D,)"), (bias, "bias", "(D,)")):
        if value is not None:
            checks.tensor(value, name, shape)
    for value, name in ((x, "x"), (residual, "residual"), (weight, "weight"), (bias, "bias")):
        if value is not None:
            checks.no_vmap_or_jvp(value, name)
    eps = checks.number(eps, "eps", "added to the variance")
    if plan.r == 0:
        ops.merge_norm.check_merge_norm(x, residual, plan._groups(size), weight, bias, eps, backend)
        _check_backend(backend, ops.merge_norm.dispatch_tensor(x, residual))
        y = x + residual
        size = torch.ones_like(plan.dest, dtype=torch.float32) if size is None else size
        return y, ops.merge_norm.layer_norm(y, weight, bias, eps), size
    size = None if size is None else size.detach()
    if onnx.is_onnx_exporting():
        ops.merge_norm.check_merge_norm(x, residual, plan._groups(size), weight, bias, eps, backend)
        tokens = (plan.dest, plan._weightless(), plan.tokens_out)
        return onnx.merge_norm(x, residual, *tokens, size, weight, bias, eps)
    return torch.ops.stoptome.merge_norm(x, residual, plan.members, plan.offsets, size, weight, bias, eps, backend)[:3]


def match_merge_norm(
    metric: Tensor,
    r: int,
    protected: int,
    x: Tensor,
    residual: Tensor,
    size: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float],
) -> tuple[MergePlan, Tensor, Tensor, Tensor]:
    """Match by ``metric``, then ``merge_norm``: what a patched block does, with arguments looked at once where it can
    be. Return the plan, and what ``merge_norm`` returns. Not exported."""
    done = ops.merge_norm.match_merge_norm_directly(metric, r, protected, x, residual, size, *norm)
    if done is not None:
        return MergePlan(*done[0], protected), *done[1]
    plan = match(metric, r, protected)
    return plan, *merge_norm(x, residual, plan, size, *norm)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute proportional attention ``softmax(scale · q kᵀ + log size) v``: a key counts as often as the number of
    tokens that it represents.

    Args:
        q: ``(N, H, Tq, d)``, float32, float64, bfloat16 or float16, any strides (a view of a packed projection
            ``(N, T, 3, H, d)``, say).
        k: ``(N, H, T, d)``, q's dtype; T may differ from Tq.
        v: ``(N, H, T, d)``, q's dtype.
        size: ``(N, T)`` float32, number of tokens that each key represents; None means all ones. A key of size 0 (on a
            GPU: below 2^-126) is never attended to (a query with no other key gets 0). No gradient flows into it.
        prefix_k: ``(M, H, G, d)``, keys in front of those of the item, each counted once; or None. M divides N, and
            item n has the prefix ``n // (N / M)``: the frames of a video share one.
        prefix_v: ``(M, H, G, d)``, values of these keys; None if and only if ``prefix_k`` is.
        scale: factor of the products q kᵀ; ``1 / sqrt(d)`` if None.
        backend: ``auto``, ``triton`` (any number of keys, d up to 128), ``native`` (on a CPU), ``reference``, or
            ``augmented``: torch's own ``scaled_dot_product_attention`` with the prefix concatenated and the sizes as
            channels of the keys (``augment_qk``). Where no kernel of ours can run, on any device without size and
            prefix, and on a CPU where a gradient is wanted, ``auto`` and ``native`` take torch's function too, with
            the sizes as a mask of one row per item. But flash kernels for GPUs take no mask: there ``auto`` means
            ``augmented`` for bfloat16 and float16, d up to 254 and scales that ``augment_qk`` takes.

    Returns:
        ``(N, H, Tq, d)`` in q's dtype, as a view of ``(N, Tq, H, d)``: ``out.transpose(1, 2).reshape(N, Tq, H * d)``
        copies nothing. The softmax is computed in float32 (float64 for float64). Products of float32 inputs are full
        float32, unless torch's own function runs and tf32 is allowed.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device; the message names it.
        RuntimeError: an explicit backend can't run here; the message says why.

    Under autocast q, k, v and the prefix are cast as by ``scaled_dot_product_attention``.

    Once differentiable in q, k, v and the prefix, in reverse mode (``backend="reference"``: twice). Gradients are
    deterministic, on a GPU where torch's own function runs as far as that one's are; that of the prefix is summed over
    the items that share it.

    Source: Bolya et al., ICLR 2023, section 3, "Tracking Token Size" (proportional attention); Vaswani et al., 2017.
    """
    done = ops.attention.attention_directly(
        reference.AttentionInputs(q, k, v, size, prefix_k, prefix_v, scale), backend
    )
    if done is not None:
        return done
    checks.tensor(q, "q", "(N, H, Tq, d)")
    checks.tensor(k, "k", "(N, H, T, d)")
    checks.tensor(v, "v", "(N, H, T, d)")
    for value, name, shape in (
        (size, "size", "(N, T)"),
        (prefix_k, "prefix_k", "(M, H, G, d)"),
        (prefix_v, "prefix_v", "(M, H, G, d)"),
    ):
        if value is not None:
            checks.tensor(value, name, shape)
    for value, name in ((q, "q"), (k, "k"), (v, "v"), (prefix_k, "prefix_k"), (prefix_v, "prefix_v")):
        if value is not None:
            checks.no_vmap_or_jvp(value, name)
    scale = None if scale is None else checks.number(scale, "scale", "factor of the products")
    q, k, v, prefix_k, prefix_v = ops.library.as_autocast(q, k, v, prefix_k, prefix_v)
    size = None if size is None else size.detach()
    inputs = reference.AttentionInputs(q, k, v, size, prefix_k, prefix_v, scale)
    checks.attention(inputs, backend, checks.AUGMENTED)
    plain = size is None and prefix_k is None
    native = ops.attention.native_takes(inputs)
    channels = ops.augment.takes(inputs)
    how = choose_attention(backend, q.device.type, q.dtype, TRITON.takes(inputs), native, channels, plain)
    if how == "sdpa" or onnx.is_onnx_exporting():
        return ops.attention.sdpa(inputs)
    if how == checks.AUGMENTED:
        return ops.attention.augmented(inputs)
    if how == "reference":  # not as an operator: so it can be differentiated twice
        return reference.attention(inputs)[0]
    return torch.ops.stoptome.attention(*inputs, backend)[0]


def augment_qk(q: Tensor, k: Tensor, size: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor, float]:
    """Return queries and keys with the logarithms of the sizes as channels, for any attention kernel, also one without
    a mask: ``softmax(scale' · q' k'ᵀ) v`` is ``softmax(scale · q kᵀ + log size) v``.

    ``q' = [q, c, c]`` and ``k' = [k, hi, lo]``: ``hi + lo`` is ``log(size) / (scale · c)`` in two parts of the dtype,
    and c a power of two near ``1 / scale``. With FlashAttention::

        q2, k2, scale = stk.augment_qk(q, k, size)
        v2 = torch.nn.functional.pad(v, (0, q2.shape[3] - v.shape[3]))  # where the kernel wants one width of all
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q2, k2, v2)), softmax_scale=scale)[..., : v.shape[3]]

    Args:
        q: ``(N, H, Tq, d)``, float32, float64, bfloat16 or float16, any strides. Sequences of several lengths that are
            packed one behind the other, ``(total, H, d)``, are one item: ``q.transpose(0, 1)[None]``.
        k: ``(N, Hk, T, d)``, q's dtype; H is a multiple of Hk (queries may share keys).
        size: ``(N, T)`` float32, number of tokens that each key represents. A key of size 0 gets a finite score so low
            that its weight is 0. Where all sizes of an item are 0, what a kernel returns is no zero but a mean of its
            values: multiply it by ``(size != 0).any(1)``. A NaN or a negative size makes its item NaN, as its logarithm
            does. No gradient flows into it.
        scale: factor of the products q kᵀ, from 2e-6 to 2.6e5, or the negative of that; ``1 / sqrt(d)`` if None.

    Returns:
        ``q' (N, H, Tq, d')``, ``k' (N, Hk, T, d')`` in q's dtype, and the scale to give to the kernel, which would take
        ``1 / sqrt(d')``, and be wrong. d' is d + 2, padded by zeros in k' to a multiple of 8 (64 → 72). Both are views
        of ``(N, Tq, H, d')`` and ``(N, T, Hk, d')``: ``.transpose(1, 2)`` is contiguous. Of a negative scale the
        absolute value is returned, with q negated.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range; the message names it.

    The bias is exact to 16 bits in bfloat16 and 22 in float16, where one channel, or a mask in that dtype, has 8 and
    11. The score of a key of size 0 is lower by 90,000 than it would be (by 8,000 near the limits of scale).

    Consists of torch's own operations: differentiable in q and k, traced, exported and transformed as they are. Under
    autocast q and k are cast as by ``scaled_dot_product_attention``, before the logarithms are split: call it where the
    kernel runs, with inputs of the dtype that the kernel gets.

    Source: FlashBias, arXiv 2505.12044 (a bias of low rank as channels); Bolya et al., ICLR 2023, section 3.
    """
    checks.tensor(q, "q", "(N, H, Tq, d)")
    checks.tensor(k, "k", "(N, Hk, T, d)")
    checks.tensor(size, "size", "(N, T)")
    scale = None if scale is None else checks.number(scale, "scale", "factor of the products")
    q, k = ops.library.as_autocast(q, k)
    checks.augment_qk(q, k, size)
    return ops.augment.augment_qk(q, k, size, q.shape[3] ** -0.5 if scale is None else scale)


def fft_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Convolve over time, height and width in the frequency domain: ``conv3d`` with the padding that keeps the size,
    made for large kernels and few channels (3 × 11 × 11 taps and 9 channels, say).

    Args:
        x: ``(B, C, T, H, W)``, float32, float64, bfloat16 or float16, any strides.
        weight: ``(O, C, kt, kh, kw)``, odd sizes kt, kh and kw; floating, float64 only if x is.
        bias: ``(O,)``, added to each output channel, in such a dtype; None for no bias.
        backend: ``auto``, ``triton``, ``native`` or ``reference``, which is torch's own ``conv3d`` with its settings
            (tf32, determinism); what is said of arithmetic below is of the other two.

    Returns:
        ``(B, O, T, H, W)`` in x's dtype: ``conv3d(x, weight, bias, padding=(kt // 2, kh // 2, kw // 2))`` up to
        rounding. Transforms and products are in float32 (float64 for float64), never tf32.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device; the message names it.
        RuntimeError: an explicit backend can't run here; the message says why.

    The rounding error is relative to the root mean square of a plane, where that of ``conv3d`` is relative to the
    values under the kernel: it is lower for natural images, and higher next to an outlier. For the same reason a NaN or
    an infinity makes the planes of its frame, and those of kt // 2 frames before and after, NaN everywhere.

    Under autocast x is cast as by ``conv3d``. Once differentiable in x, weight and bias, in reverse mode. The same
    input gives the same result and gradients bit for bit on one machine with the same number of threads.

    Source: Mathieu et al., Fast Training of Convolutional Networks through FFTs, ICLR 2014.
    """
    checks.tensor(x, "x", "(B, C, T, H, W)")
    checks.tensor(weight, "weight", "(O, C, kt, kh, kw)")
    if bias is not None:
        checks.tensor(bias, "bias", "(O,)")
    for value, name in ((x, "x"), (weight, "weight"), (bias, "bias")):
        if value is not None:
            checks.no_vmap_or_jvp(value, name)
    (x,) = ops.library.as_autocast(x)  # weights stay as they are: products are in float32
    if onnx.is_onnx_exporting():
        checks.fft_conv3d(x, weight, bias, backend)
        return reference.fft_conv3d(x, weight, bias)
    return torch.ops.stoptome.fft_conv3d(x, weight, bias, backend)


def _check_plan(plan: object) -> None:
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan must be a MergePlan from match(), got {type(plan).__name__}")
    checks.parts(plan.dest, plan.members, plan.offsets)
    if plan.r == 0:
        checks.merges_nothing(plan.members, plan.offsets)


def _check_backend(backend: str, tensor: Tensor) -> None:
    """Raise if a backend can't run, even where there is nothing for it to do; a traced graph runs on no backend."""
    if not torch.compiler.is_compiling():
        choose(backend, tensor)
