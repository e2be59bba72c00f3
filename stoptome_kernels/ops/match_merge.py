# SPDX-License-Identifier: Apache-2.0
"""The operators match, match_sets, merge and unmerge, and the backward of the last two."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .._backends import choose
from ..layout import empty_merged, empty_plan
from ..plan import MergePlan
from ..reference import Groups, arrange, cap_r, identity, winners
from . import direct
from .library import define, gradient

# -- match ------------------------------------------------------------------------------------------------------------


def _capped(metric: Tensor, r: int, protected: int) -> int:
    return cap_r(r, metric.shape[-2], protected)


def _match(metric: Tensor, r: int, protected: int = 1, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    checks.match(metric, r, protected, backend)
    r = _capped(metric, r, protected)
    run = choose(backend, metric)
    metric = metric if metric.dim() == 4 else metric.unsqueeze(1)
    if r == 0 or metric.shape[0] == 0:
        return identity(metric.shape[0], metric.shape[2], metric.shape[2] - r, metric.device)
    return run.match(metric, r, protected)


def _match_fake(metric: Tensor, r: int, protected: int = 1, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    checks.match(metric, r, protected, backend)
    return empty_plan(metric, _capped(metric, r, protected))


def _capped_by_sets(r: int, src: Tensor, dst: Tensor) -> int:
    return min(r, src.shape[0]) if dst.shape[0] else 0


def _match_sets(
    metric: Tensor, r: int, src: Tensor, dst: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    checks.match_sets(metric, r, src, dst, backend)
    metric = metric if metric.dim() == 4 else metric.unsqueeze(1)
    tokens, sources = metric.shape[2], src.shape[0]
    if src.device.type == "cpu":
        checks.indices(src, dst, tokens)
    r = _capped_by_sets(r, src, dst)
    run = choose(backend, metric)
    if r == 0 or metric.shape[0] == 0:
        return identity(metric.shape[0], tokens, tokens - r, metric.device)
    return run.match(metric, r, tokens - sources - dst.shape[0], arrange(src, dst, tokens), sources)


def _match_sets_fake(
    metric: Tensor, r: int, src: Tensor, dst: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    checks.match_sets(metric, r, src, dst, backend)
    return empty_plan(metric, _capped_by_sets(r, src, dst))


define(
    "match(Tensor metric, SymInt r, SymInt protected=1, str backend='auto') -> (Tensor, Tensor, Tensor)",
    _match,
    _match_fake,
)
define(
    "match_sets(Tensor metric, SymInt r, Tensor src, Tensor dst, str backend='auto') -> (Tensor, Tensor, Tensor)",
    _match_sets,
    _match_sets_fake,
)


def match_directly(metric: Tensor, r: int, protected: int, backend: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Match past the dispatcher, see ``direct``; None where the operator has to be called. Arguments as its."""
    if type(r) is not int or type(protected) is not int or direct.device_if_unseen(metric) is None:
        return None
    if not direct.is_metric(metric) or backend not in checks.BACKENDS:
        return None
    tokens = metric.shape[-2]
    r = cap_r(r, tokens, protected) if 0 <= protected <= tokens < 2**31 else 0
    return choose(backend, metric).match(direct.by_heads(metric), r, protected) if r > 0 else None


# -- merge ------------------------------------------------------------------------------------------------------------


def check_merge(x: Tensor, groups: Groups, mode: str, backend: str) -> None:
    """Raise what is wrong with the arguments of merge."""
    checks.rows(x, "x", groups, backend)
    checks.choice(mode, "mode", checks.MODES)


def _checked(x, members, offsets, size=None, mode="mean", backend="auto") -> tuple[Tensor, Groups, str, str]:
    """Check the operator's arguments; return x, its groups and sizes, mode and backend."""
    groups = Groups(members, offsets, size)
    check_merge(x, groups, mode, backend)
    return x, groups, mode, backend


def _merge(*arguments) -> tuple[Tensor, Tensor]:
    x, groups, mode, backend = _checked(*arguments)
    return choose(backend, x).reduce(x, groups, mode)


def _merge_fake(*arguments) -> tuple[Tensor, Tensor]:
    x, groups, _, _ = _checked(*arguments)
    return empty_merged(x, groups)


def _merge_out(*arguments) -> None:
    *given, y, size_out = arguments
    x, groups, mode, backend = _checked(*given)
    checks.outputs(y, size_out, x, groups.offsets)
    checks.no_overlap({"out[0]": y, "out[1]": size_out}, {"x": x, "size": groups.size})
    torch.autograd.graph.increment_version((y, size_out))  # graphs that saved them must notice
    choose(backend, x).reduce(x, groups, mode, (y, size_out))


def _merge_out_fake(*arguments) -> None:
    *given, y, size_out = arguments
    x, groups, _, _ = _checked(*given)
    checks.outputs(y, size_out, x, groups.offsets)


def _merge_backward(grad, members, offsets, size, x, y, mode, backend) -> Tensor:
    groups = Groups(members, offsets, size)
    checks.rows(grad, "grad", groups, backend, merged=True)
    checks.choice(mode, "mode", checks.MODES)
    checks.max_backward_inputs(x, y, grad, members, mode)
    return choose(backend, grad).spread(grad, groups, mode, x, y)


def _merge_backward_fake(grad, members, offsets, size, x, y, mode, backend) -> Tensor:
    return grad.new_empty(grad.shape[0], members.shape[1], grad.shape[2])


define(
    "merge(Tensor x, Tensor members, Tensor offsets, Tensor? size=None, str mode='mean', str backend='auto')"
    " -> (Tensor, Tensor)",
    _merge,
    _merge_fake,
)
# `how` is the mode under another name: torch's functionalization has an argument `mode` of its own and mixes them up
define(
    "merge_out(Tensor x, Tensor members, Tensor offsets, Tensor? size, str how, str backend, Tensor(a!) y,"
    " Tensor(b!) size_out) -> ()",
    _merge_out,
    _merge_out_fake,
)
define(
    "merge_backward(Tensor grad, Tensor members, Tensor offsets, Tensor? size, Tensor? x, Tensor? y, str mode,"
    " str backend) -> Tensor",
    _merge_backward,
    _merge_backward_fake,
)


def _save_merge(ctx, inputs, output) -> None:
    x, members, offsets, size, ctx.mode, ctx.backend = inputs
    keep = (x, output[0]) if ctx.mode == "max" else (None, None)
    ctx.save_for_backward(members, offsets, size, *keep)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad_merge(ctx, grad_y, _grad_size):
    if grad_y is None:
        return None, None, None, None, None, None
    members, offsets, size, x, y = ctx.saved_tensors
    grad = merge_backward(grad_y, members, offsets, size, x, y, ctx.mode, ctx.backend)
    return grad, None, None, None, None, None


def merge_backward(grad, members, offsets, size, x, y, mode, backend) -> Tensor:
    """Call the operator of this name, past the dispatcher where nobody would see it."""
    device = direct.device_if_unseen(grad)
    # whoever saved tensors may give back others: hooks on them, or new data behind a tensor
    if (
        device
        and direct.is_mergeable(grad, members, offsets, size, device, merged=True)
        and (mode != "max" or _extremes_fit(grad, members, x, y, device))
        and not direct.needs_gradient(grad, x, y)
    ):
        return choose(backend, grad).spread(grad, Groups(members, offsets, size), mode, x, y)
    return torch.ops.stoptome.merge_backward(grad, members, offsets, size, x, y, mode, backend)


def _extremes_fit(grad: Tensor, members: Tensor, x: Tensor | None, y: Tensor | None, device: str) -> bool:
    """Return whether the merge's input and output, which the gradient of a maximum needs, fit the rest."""
    if not direct.are_on(device, x, y) or x is None or y is None:
        return False
    items, tokens, dim = *members.shape, grad.shape[2]
    return (
        direct.are_like(grad, y)
        and x.shape == (items, tokens, dim)
        and x.dtype == grad.dtype
        and x.device == grad.device
    )


def _save_merge_backward(ctx, inputs, output) -> None:
    _, members, offsets, size, x, y, ctx.mode, ctx.backend = inputs
    ctx.save_for_backward(members, offsets, size, x, y)


def _grad_merge_backward(ctx, grad):
    # the backward is linear in the incoming gradient: its adjoint is the merge itself
    members, offsets, size, x, y = ctx.saved_tensors
    if ctx.mode == "max":
        twice = grad.gather(1, winners(x, y, Groups(members, offsets)))
    else:
        twice, _ = torch.ops.stoptome.merge(grad, members, offsets, size, ctx.mode, ctx.backend)
    return twice, None, None, None, None, None, None, None


gradient("merge", _grad_merge, _save_merge)
gradient("merge_backward", _grad_merge_backward, _save_merge_backward)


def _reduce(x, members, offsets, size, mode, backend) -> tuple[Tensor, Tensor]:
    return choose(backend, x).reduce(x, Groups(members, offsets, size), mode)


_differentiable_merge = direct.function("merge", _reduce, _grad_merge, _save_merge)


def merge_directly(
    x: Tensor, plan: MergePlan, size: Tensor | None, mode: str, backend: str
) -> tuple[Tensor, Tensor] | None:
    """Merge past the dispatcher, see ``direct``; None where the operator has to be called, or plan merges nothing."""
    device = direct.device_if_unseen(x)
    if device is None or mode not in checks.MODES or backend not in checks.BACKENDS or not direct.is_plan(plan, device):
        return None
    if not direct.is_mergeable(x, plan.members, plan.offsets, size, device):
        return None
    if direct.needs_gradient(x):
        size = None if size is None else size.detach()
        return _differentiable_merge(x, plan.members, plan.offsets, size, mode, backend)
    return _reduce(x, plan.members, plan.offsets, size, mode, backend)


# -- unmerge ----------------------------------------------------------------------------------------------------------


def check_unmerge(y: Tensor, groups: Groups, backend: str) -> None:
    """Raise what is wrong with the arguments of unmerge."""
    checks.rows(y, "y", groups, backend, merged=True)


def _unmerge(y: Tensor, members: Tensor, offsets: Tensor, backend: str = "auto") -> Tensor:
    groups = Groups(members, offsets)
    check_unmerge(y, groups, backend)
    return choose(backend, y).spread(y, groups, "all")


def _unmerge_fake(y: Tensor, members: Tensor, offsets: Tensor, backend: str = "auto") -> Tensor:
    check_unmerge(y, Groups(members, offsets), backend)
    return y.new_empty(y.shape[0], members.shape[1], y.shape[2])


def _unmerge_backward(grad: Tensor, members: Tensor, offsets: Tensor, backend: str) -> Tensor:
    groups = Groups(members, offsets)
    checks.rows(grad, "grad", groups, backend)
    return choose(backend, grad).reduce(grad, groups, "all")[0]


def _unmerge_backward_fake(grad: Tensor, members: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return empty_merged(grad, Groups(members, offsets))[0]


define("unmerge(Tensor y, Tensor members, Tensor offsets, str backend='auto') -> Tensor", _unmerge, _unmerge_fake)
define(
    "unmerge_backward(Tensor grad, Tensor members, Tensor offsets, str backend) -> Tensor",
    _unmerge_backward,
    _unmerge_backward_fake,
)


def _save_unmerge(ctx, inputs, output) -> None:
    _, members, offsets, ctx.backend = inputs
    ctx.save_for_backward(members, offsets)


def _grad_unmerge(ctx, grad):
    members, offsets = ctx.saved_tensors
    device = direct.device_if_unseen(grad)
    if device and direct.is_mergeable(grad, members, offsets, None, device) and not direct.needs_gradient(grad):
        return choose(ctx.backend, grad).reduce(grad, Groups(members, offsets), "all")[0], None, None, None
    return torch.ops.stoptome.unmerge_backward(grad, members, offsets, ctx.backend), None, None, None


def _grad_unmerge_backward(ctx, grad):
    return torch.ops.stoptome.unmerge(grad, *ctx.saved_tensors, ctx.backend), None, None, None


gradient("unmerge", _grad_unmerge, _save_unmerge)
gradient("unmerge_backward", _grad_unmerge_backward, _save_unmerge)


def _spread(y, members, offsets, backend) -> Tensor:
    return choose(backend, y).spread(y, Groups(members, offsets), "all")


_differentiable_unmerge = direct.function("unmerge", _spread, _grad_unmerge, _save_unmerge)


def unmerge_directly(y: Tensor, plan: MergePlan, backend: str) -> Tensor | None:
    """Unmerge past the dispatcher, see ``direct``; None where the operator has to be called, or plan merges nothing."""
    device = direct.device_if_unseen(y)
    if device is None or backend not in checks.BACKENDS or not direct.is_plan(plan, device):
        return None
    if not direct.is_mergeable(y, plan.members, plan.offsets, None, device, merged=True):
        return None
    run = _differentiable_unmerge if direct.needs_gradient(y) else _spread
    return run(y, plan.members, plan.offsets, backend)
