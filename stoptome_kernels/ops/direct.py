# SPDX-License-Identifier: Apache-2.0
"""Calls of the operators past the dispatcher, which costs more than the kernels do on small tensors.

An operator stays what traces, modes, transforms, subclasses, profilers and other devices see: a call is direct only if
none of them could notice it, and if its arguments are right at first sight. Whatever else it is takes the operator,
which says what is wrong with it. So nothing here raises, and nothing here converts. Recorders that torch can't tell of
(an ExecutionTraceObserver without a profiler) see direct calls no more; ``STOPTOME_DIRECT=0``, read at import, turns
them off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from ..checks import DTYPES
from ..plan import MergePlan

_C: Any = torch._C


def _set_of(*names: str) -> int:
    """Return a set of dispatch keys as a number."""
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return keys.raw_repr()


try:
    _keys_of, _included = _C._dispatch_keys, _C._dispatch_tls_local_include_set
    _excluded = _C._dispatch_tls_is_dispatch_key_excluded
    has_function_modes, _profiles = _C._len_torch_function_stack, _C._autograd._profiler_enabled
    _AUTOGRAD = _C.DispatchKey.AutogradFunctionality  # of any device
    # what a thread's dispatcher adds to every call: without modes, traces and transforms; in inference mode the latter
    _EAGER = {_set_of("BackendSelect", "ADInplaceOrView"), _set_of("BackendSelect")}
    # the keys of tensors that are plain memory: no subclass, wrapper, or view with a bit set; in inference mode the
    # latter
    _PLAIN = {
        _set_of(key, *more, f"Autocast{key}"): key.lower()
        for key in ("CPU", "CUDA")
        for more in (("ADInplaceOrView", f"Autograd{key}"), ())
    }
    _knows_torch = hasattr(profiler, "_is_profiler_enabled") and os.environ.get("STOPTOME_DIRECT") != "0"
except AttributeError:  # a torch without one of these, which are not public: every call takes the operator
    _knows_torch = False
_TENSORS = (Tensor, Parameter)
FLOATING = frozenset(DTYPES)


def is_eager() -> bool:
    """Return whether no trace, dispatch mode or transform would see an operator that is called now."""
    return (
        _knows_torch
        and not torch.compiler.is_compiling()
        and _included().raw_repr() in _EAGER
        and forward_ad._current_level < 0
    )


def is_unseen() -> bool:
    """Return whether nothing at all would see it: no function mode and no profiler either."""
    # a compiler reads the first alone: it would compile anew once a profiler starts
    return is_eager() and not has_function_modes() and not profiler._is_profiler_enabled and not _profiles()


def device_of(x: object) -> str | None:
    """Return the type of device of a tensor that kernels may read as it is; None for anything else."""
    return _PLAIN.get(_keys_of(x).raw_repr()) if type(x) in _TENSORS else None


def device_if_unseen(x: object) -> str | None:
    """Return ``device_of`` a tensor if nothing would see an operator that is called on it now, else None."""
    return device_of(x) if is_unseen() else None


def are_on(device: str, *tensors: object) -> bool:
    """Return whether all of these are tensors that kernels may read as they are, on a type of device."""
    for x in tensors:  # noqa: SIM110, a generator takes longer
        if type(x) not in _TENSORS or _PLAIN.get(_keys_of(x).raw_repr()) != device:
            return False
    return True


def are_none_or_on(device: str, *tensors: object) -> bool:
    """Return the same of optional tensors."""
    for x in tensors:
        if x is not None and (type(x) not in _TENSORS or _PLAIN.get(_keys_of(x).raw_repr()) != device):
            return False
    return True


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd has to note a call, as the dispatcher would decide."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        if x is not None and x.requires_grad:
            return not _excluded(_AUTOGRAD)
    return False


def is_metric(x: Tensor, items: int | None = None, tokens: int | None = None) -> bool:
    """Return whether ``(N, T, C)`` or ``(N, H, T, C)`` can be matched; of so many items and tokens, if these are
    given."""
    shape = x.shape
    if len(shape) not in (3, 4) or 0 in shape or x.dtype not in FLOATING:
        return False
    return items is None or (shape[0] == items and shape[-2] == tokens)


def by_heads(metric: Tensor) -> Tensor:
    """Return a metric as ``Backend.match`` takes it: ``(N, H, T, C)``, without a gradient."""
    metric = metric.detach() if metric.requires_grad else metric
    return metric if metric.dim() == 4 else metric.unsqueeze(1)


def are_sizes(size: Tensor, items: int, tokens: int, here: torch.device) -> bool:
    """Return whether sizes of so many tokens on a device are right; ``are_on`` is asked before."""
    return (
        size.dtype == torch.float32 and size.shape == (items, tokens) and size.device == here and not size.requires_grad
    )


def is_mergeable(
    x: Tensor, members: Tensor, offsets: Tensor, size: Tensor | None, device: str, merged: bool = False
) -> bool:
    """Return whether ``x (N, T, D)``, the groups of a plan that merges tokens, and sizes are right at first sight.

    Args:
        x: tensor of which ``device_if_unseen`` has said this type of device.
        members: ``(N, T)``.
        offsets: ``(N, T_out + 1)``.
        size: ``(N, T)``, or None.
        device: type of device.
        merged: whether x has the tokens that are left after merging.
    """
    if not are_on(device, members, offsets) or not are_none_or_on(device, size) or x.dtype not in FLOATING:
        return False
    here, shape, ends, rows = x.device, members.shape, offsets.shape, x.shape
    if (
        len(shape) != 2
        or len(ends) != 2
        or len(rows) != 3
        or 0 in rows
        or not members.dtype == offsets.dtype == torch.int32
        or not members.device == offsets.device == here
    ):
        return False
    items, tokens = shape
    after = ends[1] - 1
    if size is not None and not are_sizes(size, items, tokens, here):
        return False
    return rows[0] == ends[0] == items and rows[1] == (after if merged else tokens) and 0 < after < tokens


def is_plan(plan: object, device: str) -> bool:
    """Return whether this is a plan whose ``dest``, which merging does not read, is as its members are."""
    if type(plan) is not MergePlan:
        return False
    dest, members = plan.dest, plan.members
    return (
        are_on(device, dest, members)
        and dest.dtype == torch.int32
        and dest.shape == members.shape
        and dest.device == members.device
    )


def are_like(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether optional tensors have x's shape, dtype and device; ``are_none_or_on`` is asked before."""
    shape, dtype, here = x.shape, x.dtype, x.device
    for other in others:
        if other is not None and (other.shape != shape or other.dtype != dtype or other.device != here):
            return False
    return True


def function(name: str, run: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """Return what ``run`` computes as a function with a gradient, outside of the dispatcher.

    Args:
        name: name of the operator, which the graph's nodes get.
        run: implementation; it takes and gives what the operator does.
        backward: gradient, as the operator has it.
        setup_context: what it saves, as the operator has it.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    made: Any = type(name, (torch.autograd.Function,), methods)
    return made.apply
