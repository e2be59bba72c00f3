# SPDX-License-Identifier: Apache-2.0
"""The public functions: match, merge, unmerge."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, dispatch
from .ops import merging
from .plan import MergePlan


def match(metric: Tensor, r: int, protected: int = 1, backend: str = "auto") -> MergePlan:
    """Decide which ``r`` tokens of every item are merged into which others (bipartite soft matching).

    Tokens with an even index propose their most similar token with an odd index (cosine similarity of ``metric``, the
    lowest index on a tie); the r proposals of highest similarity are carried out (the lowest proposer on a tie). The
    output order is: protected tokens, the unmerged even ones, all odd ones, each ascending. With ``r = 0`` nothing
    moves.

    Args:
        metric: ``(N, T, C)`` or ``(N, H, T, C)``, float32, float64, bfloat16 or float16, any strides; the mean over
            heads is taken inside. No gradient flows into it.
        r: tokens to remove from each item; capped at ``(T - protected) // 2``.
        protected: leading tokens that are neither sources nor destinations (class token, prompts).
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        A :class:`MergePlan` on metric's device.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or range; the message names it.
        RuntimeError: an explicit backend can't run here; the message says why.

    Arithmetic is in float32 (float64 for float64), never tf32. The same input gives the same plan bit for bit. A token
    of norm 0 has similarity 0 to all; one that holds a NaN or an infinity is never matched, and if too few others are
    left it is removed with weight 0.

    Source: Bolya et al., ICLR 2023, section 3; TempMe (Shen et al., ICLR 2025) for several protected tokens.
    """
    checks.tensor(metric, "metric", "(N, T, C) or (N, H, T, C)")
    r = checks.count(r, "r", "tokens to remove from each item")
    protected = checks.count(protected, "protected", "leading tokens that are never merged")
    checks.choice(backend, "backend", checks.BACKENDS)
    checks.plain(metric, "metric")
    dest, members, offsets = torch.ops.stoptome.match(metric.detach(), r, protected, backend)
    return MergePlan(dest, members, offsets, protected)


def merge(
    x: Tensor,
    plan: MergePlan,
    size: Tensor | None = None,
    mode: str = "mean",
    backend: str = "auto",
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the tokens of ``x`` as ``plan`` says.

    Args:
        x: ``(N, T, D)``, float32, float64, bfloat16 or float16, any strides.
        plan: from :func:`match`.
        size: ``(N, T)`` float32, how many original tokens each token stands for (positive); None for all ones. No
            gradient flows into it.
        mode: ``mean`` weighted by size, ``sum`` (unweighted) or ``max`` (elementwise; NaN if a member is NaN).
        backend: ``auto``, ``triton``, ``native`` or ``reference``.
        out: ``(y, size)`` to write the results to, contiguous and apart from x; for inference, where fresh memory can
            cost more than the merge itself (on a CPU its pages come from the system one by one).

    Returns:
        ``y (N, T - r, D)`` in x's dtype and ``size (N, T - r)`` float32. Sums run in float32 (float64 for float64) in
        ascending token order: the result is the same bit for bit from run to run. A token that nothing was merged
        into is copied bit for bit. For a plan with r = 0, ``x`` and ``size`` themselves are returned.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device; the message names it.
        RuntimeError: an explicit backend can't run here, or ``out`` was given where x needs a gradient.

    Differentiable in x, twice, in reverse mode (forward mode and vmap raise). The gradient of ``max`` goes to the
    lowest token that reaches the maximum.

    Source: Bolya et al., ICLR 2023, "Tracking Token Size".
    """
    checks.tensor(x, "x", "(N, T, D)")
    _check_plan(plan)
    checks.plain(x, "x")
    if size is not None:
        checks.tensor(size, "size", "(N, T)")
    checks.choice(mode, "mode", checks.MODES)
    if out is not None:
        return _merge_into(x, plan, size, mode, backend, out)
    if plan.r == 0:  # an op may not return its input, and there is nothing to compute
        merging.check_merge(x, plan.members, plan.offsets, size, mode, backend)
        _check_backend(backend, x)
        return x, torch.ones_like(plan.dest, dtype=torch.float32) if size is None else size
    size = None if size is None else size.detach()
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
        raise RuntimeError("out=... can't be differentiated: call it under torch.no_grad(), or leave out away")
    torch.ops.stoptome.merge_out(
        x, plan.members, plan.offsets, None if size is None else size.detach(), mode, backend, y, size_out
    )
    return y, size_out


def unmerge(y: Tensor, plan: MergePlan, backend: str = "auto") -> Tensor:
    """Give every original token the row of the token it was merged into: ``x̂_i = y_dest(i)``.

    Args:
        y: ``(N, tokens_out, D)``, float32, float64, bfloat16 or float16, any strides.
        plan: the plan (or composed plan) that led to y's tokens.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``(N, tokens_in, D)`` in y's dtype. For a plan with r = 0, ``y`` itself.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device; the message names it.
        RuntimeError: an explicit backend can't run here; the message says why.

    Differentiable in y, twice; the gradient is the sum over the tokens of each group, in ascending order.
    """
    checks.tensor(y, "y", "(N, tokens_out, D)")
    _check_plan(plan)
    checks.plain(y, "y")
    if plan.r == 0:
        merging.check_unmerge(y, plan.members, plan.offsets, backend)
        _check_backend(backend, y)
        return y
    return torch.ops.stoptome.unmerge(y, plan.members, plan.offsets, backend)


def _check_plan(plan: object) -> None:
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan must be a MergePlan from match(), got {type(plan).__name__}")


def _check_backend(backend: str, tensor: Tensor) -> None:
    """A backend that can't run says so even where there is nothing for it to do; a traced graph runs on no backend."""
    if not torch.compiler.is_compiling():
        dispatch.choose(backend, tensor)
