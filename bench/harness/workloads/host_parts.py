# SPDX-License-Identifier: Apache-2.0
"""Parts of a call of match, merge, merge_norm and attention: nested calls, and the differences between them.

A call goes past torch.library's dispatcher where nobody would see it (``stoptome_kernels.ops.direct``): ``DIRECT``.
``OPERATOR`` is the way that it takes otherwise; it is forced by saying that somebody would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import stoptome_kernels as stk
import torch
from stoptome_kernels import layout, ops
from stoptome_kernels._backends import NATIVE, TRITON, choose, choose_attention, native
from stoptome_kernels.ops import direct
from stoptome_kernels.reference import Groups
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..rows import WHOLE
from .host import PROTECTED, SIZED, Call, Inputs, R, op_calls

OPS = ("match", "merge", "merge_norm", SIZED)
DIRECT, OPERATOR = "direct", "by torch.library"
ON_TOP = "noting a gradient, on top"
Pieces = dict[str, Call]  # by the names that ``parts`` reads


def nested(backend: str, plain: Inputs, differentiable: Inputs) -> dict[str, Pieces]:
    """Return what is timed of each op, beside its own calls without and with a gradient: the pieces inside them, by
    names that ``parts`` reads; those that begin with ``OPERATOR`` are whole calls, to be run by ``again`` as such."""
    made = {"match": _match, "merge": _merge, "merge_norm": _merge_norm, SIZED: _attention}
    found = {op: {"unseen": direct.is_unseen, **make(backend, plain)} for op, make in made.items()}
    calls, with_gradient = op_calls(plain), op_calls(differentiable)
    for op, pieces in found.items():
        pieces[f"{OPERATOR}, forward"] = calls[op][0]
        if op in ("merge", "merge_norm"):
            pieces[f"{OPERATOR}, with gradient"] = with_gradient[op][0]
    return found


def again(call: Call, times: int, way: str = DIRECT) -> None:
    """Run one sample: so many calls that the first, which finds the caches as another op left them, weighs little."""
    unseen = direct.is_unseen
    if way == OPERATOR:
        direct.is_unseen = _seen
    try:
        for _ in range(times):
            call()
    finally:
        direct.is_unseen = unseen


def _seen() -> bool:
    return False


def parts(us: dict[str, float]) -> Iterator[tuple[str, str, float]]:
    """Return way, part and µs of all parts of a call, from the medians of its own directions and of its pieces. Those
    of a way add up to its ``WHOLE``, but for ``ON_TOP``."""
    plan, memory = us.get("plan", 0.0), us.get("memory", 0.0)
    around = us["unseen"] + us["choose"] + us["backend"] + plan
    lines: list[tuple[str, str, float | None]] = [
        (DIRECT, "asking who would see it", us["unseen"]),
        (DIRECT, "looking at the arguments", us["forward"] - around),
        (DIRECT, "choosing the backend", us["choose"]),
        (DIRECT, "memory for the results", us.get("memory")),
        (DIRECT, "the rest of the backend", us["backend"] - memory - us["kernel"]),
        (DIRECT, "the kernel's call", us["kernel"]),
        (DIRECT, "making the plan", us.get("plan")),
        (DIRECT, WHOLE, us["forward"]),
    ]
    if "with gradient" in us and f"{OPERATOR}, with gradient" in us:
        lines.append((DIRECT, ON_TOP, us["with gradient"] - us["forward"]))
    whole, dispatched = us[f"{OPERATOR}, forward"], us["dispatched"]
    chosen = us.get("chosen inside", us["choose"])  # attention's public function chooses, too
    lines += [
        (OPERATOR, "the public function's checks", whole - us["choose"] - (dispatched - chosen) - plan),
        (OPERATOR, "torch.library's dispatch", dispatched - us["implementation"]),
        (OPERATOR, "the operator's checks", us["implementation"] - chosen - us["operator's backend"]),
        (OPERATOR, "choosing the backend", us["choose"]),
        (OPERATOR, "the backend", us["operator's backend"]),
        (OPERATOR, "making the plan", us.get("plan")),
        (OPERATOR, WHOLE, whole),
    ]
    if f"{OPERATOR}, with gradient" in us:
        lines.append((OPERATOR, ON_TOP, us[f"{OPERATOR}, with gradient"] - whole))
    return ((way, part, value) for way, part, value in lines if value is not None)


# -- the pieces of each op --------------------------------------------------------------------------------------------


def _match(backend: str, i: Inputs) -> Pieces:
    run = _run(backend)
    arguments = (i.metric, R, PROTECTED)
    return {
        "choose": partial(choose, "auto", i.metric),
        "memory": partial(layout.empty_plan, i.metric, R),
        "plan": partial(stk.MergePlan, *run.match(*arguments), PROTECTED),
        **_backend(backend, "match", run.match, run.match, arguments),
        **_operator(torch.ops.stoptome.match, ops.match_merge._match, *arguments, "auto"),
    }


def _merge(backend: str, i: Inputs) -> Pieces:
    run = _run(backend)
    groups = Groups(i.plan.members, i.plan.offsets, i.size)
    return {
        "choose": partial(choose, "auto", i.x),
        "memory": partial(layout.empty_merged, i.x, groups),
        **_backend(backend, "merge", run.reduce, run.reduce, (i.x, groups, "mean")),
        **_operator(torch.ops.stoptome.merge, ops.match_merge._merge, i.x, *groups, "mean", "auto"),
    }


def _merge_norm(backend: str, i: Inputs) -> Pieces:
    run = _run(backend)
    groups = Groups(i.plan.members, i.plan.offsets, i.size)
    arguments = (i.x, i.residual, groups, *i.norm, 1e-5)

    def memory() -> object:
        y, size = layout.empty_merged(i.x, groups)
        more = (torch.empty_like(size), torch.empty_like(size)) if backend == "triton" else ()
        return y, torch.empty_like(y), size, *more

    def choose_by_dtypes() -> object:
        return choose("auto", ops.merge_norm.dispatch_tensor(i.x, i.residual))

    given = (i.x, i.residual, *groups, *i.norm, 1e-5, "auto")
    return {
        "choose": choose_by_dtypes,
        "memory": memory,
        **_backend(backend, "norm", run.merge_norm_inference, run.merge_norm, arguments),
        **_operator(torch.ops.stoptome.merge_norm, ops.merge_norm._merge_norm, *given),
    }


def _attention(backend: str, i: Inputs) -> Pieces:
    inputs = i.attention
    q = inputs.q

    def choose_both() -> object:
        takes = (TRITON.takes(inputs), NATIVE.takes(inputs), ops.augment.takes(inputs))
        choose_attention("auto", "cpu", q.dtype, *takes, plain=False)
        return choose("auto", q, inputs)

    def memory() -> object:
        out = layout.empty_heads_last(q, *q.shape[:3])
        return (out, q.new_empty(q.shape[:3], dtype=torch.float32)) if backend == "triton" else out

    run = _run(backend)
    return {
        "choose": choose_both,
        "memory": memory,
        **_backend(backend, "attention", run.attention_inference, run.attention, (inputs,)),
        **_operator(torch.ops.stoptome.attention, ops.attention._attention, *inputs, "auto"),
        "chosen inside": partial(choose, "auto", q, inputs),
    }


def _run(backend: str) -> Any:
    return NATIVE if backend == "native" else TRITON


def _operator(dispatched: Callable, implementation: Callable, *arguments: object) -> Pieces:
    return {"dispatched": partial(dispatched, *arguments), "implementation": partial(implementation, *arguments)}


def _backend(backend: str, module: str, function: Callable, operators: Callable, arguments: tuple) -> Pieces:
    """Return the backend's function, what it calls with prepared arguments, and its function inside the operator."""
    return {
        "kernel": _native_kernel(function, arguments) if backend == "native" else _launch(module, function, arguments),
        "backend": partial(function, *arguments),
        "operator's backend": partial(operators, *arguments),
    }


# -- the kernel's call ------------------------------------------------------------------------------------------------


class _Noted:
    """A function that notes its last call, to be repeated."""

    call: partial

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments: object, **options: object) -> object:
        self.call = partial(self.function, *arguments, **options)
        return self.call()


_held: list = []  # results of noted calls: native kernels get addresses, which must stay those of live memory


def _native_kernel(function: Callable, arguments: tuple) -> Call:
    """Return the native kernel that a backend's function calls, with addresses and strides as it got them."""
    real = native._native
    kernels: dict = {name: _Noted(getattr(real, name)) for name in ("match", "reduce", "merge_norm", "attention")}
    with patch.object(native, "_native", SimpleNamespace(**kernels, instruction_set=real.instruction_set)):
        results = function(*arguments)
    (call,) = (noted.call for noted in kernels.values() if hasattr(noted, "call"))
    live = [t for t in tree_leaves((arguments, results)) if isinstance(t, Tensor)]
    addresses = {number for number in tree_leaves(call.args) if type(number) is int and number >= 1 << 32}
    if not addresses <= {t.data_ptr() for t in live}:
        raise RuntimeError("the kernel was given memory that is no argument and no result: it may be gone")
    _held.append(live)
    return call


def _launch(module: str, function: Callable, arguments: tuple) -> Call:
    """Return the launch that a Triton backend's function ends with, with its key and tensors."""
    from stoptome_kernels._backends.triton import attention, match, merge, norm

    where = {"attention": attention, "match": match, "merge": merge, "norm": norm}[module]
    with patch.object(where, "launch", _Noted(where.launch)) as noted:
        function(*arguments)
    return noted.call
