# SPDX-License-Identifier: Apache-2.0
"""Launches as they reach the driver, prepared and not, for the same inputs, as JSON on stdout: a process of its
own, since the tests' has Triton's interpreter. ``python tests/support/prepared_launches.py`` with bench/ on PYTHONPATH.

Each op is called as it usually is, and then with one thing changed at a time: whatever a key leaves out would be
launched as before.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import stoptome_kernels as stk
import torch
from torch import Tensor

from harness import no_gpu

HALF, FULL = torch.bfloat16, torch.float32


def laid(how: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return numbers behind such strides, or at an address that is no multiple of 16, that want a gradient."""
    if how == "packed":
        found = torch.randn(*shape).to(dtype)
    elif how == "wide":  # rows further apart
        found = torch.randn(*shape[:-1], shape[-1] + 8).to(dtype)[..., : shape[-1]]
    elif how == "turned":  # items next to each other
        found = torch.randn(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
    else:
        found = torch.randn(torch.Size(shape).numel() + 1).to(dtype)[1:].view(shape)
    return found.requires_grad_()


# of each argument: as it usually is, then all else that it can be
LAYOUT = ("packed", "wide", "turned", "unaligned")
KEYS = {"dtype": (HALF, FULL), "n": (2, 3), "heads": (2, 1), "tokens": (12, 16, 13), "channels": (16, 24)}
ROWS = {
    "dtype": (HALF, FULL), "n": (2, 3), "tokens": (12, 16, 13), "width": (16, 24), "r": (2, 1), "sized": (True, False),
    "grad": LAYOUT,
}  # fmt: skip
OPS: dict[str, tuple[dict, Callable]] = {}


def op(**choices: tuple) -> Callable:
    """Note an op's function with what its arguments can be."""

    def note(call: Callable) -> Callable:
        OPS[call.__name__] = choices, call
        return call

    return note


def plan_and_sizes(n: int, tokens: int, r: int, sized: bool) -> tuple:
    plan = stk.match(torch.randn(n, tokens, 4), r, 1, "reference")
    return plan, torch.ones(n, tokens) if sized else None


@op(**KEYS, layout=LAYOUT, r=(2, 1), protected=(1, 0, 2))
def match(dtype, n, heads, tokens, channels, layout, r, protected) -> tuple:
    stk.match(laid(layout, n, heads, tokens, channels, dtype=dtype), r, protected)
    return ()


@op(**ROWS, layout=LAYOUT, mode=("mean", "sum", "max"))
def merge(dtype, n, tokens, width, r, sized, layout, mode) -> tuple:
    plan, size = plan_and_sizes(n, tokens, r, sized)
    return (stk.merge(laid(layout, n, tokens, width, dtype=dtype), plan, size, mode)[0],)


@op(layout=LAYOUT, grad=LAYOUT)  # x is read once more for the gradient
def merge_max(layout) -> tuple:
    return merge(HALF, 2, 12, 16, 2, True, layout, "max")


@op(**ROWS, layout=LAYOUT)
def unmerge(dtype, n, tokens, width, r, sized, layout) -> tuple:
    plan, _ = plan_and_sizes(n, tokens, r, sized)
    return (stk.unmerge(laid(layout, n, tokens - r, width, dtype=dtype), plan),)


@op(
    **ROWS, x=LAYOUT, residual=LAYOUT, residual_dtype=(HALF, FULL), weight=(FULL, HALF, None), bias=(FULL, HALF, None),
    eps=(1e-5, 1e-6), outputs=(slice(2), slice(0, 1), slice(1, 2)),
)  # fmt: skip
def merge_norm(dtype, n, tokens, width, r, sized, x, residual, residual_dtype, weight, bias, eps, outputs) -> tuple:
    plan, size = plan_and_sizes(n, tokens, r, sized)
    affine = (None if d is None else torch.ones(width, dtype=d, requires_grad=True) for d in (weight, bias))
    rows = laid(x, n, tokens, width, dtype=dtype), laid(residual, n, tokens, width, dtype=residual_dtype)
    return stk.merge_norm(*rows, plan, size, *affine, eps)[:2][outputs]


@op(grad=LAYOUT)  # of normed alone
def normed_alone() -> tuple:
    packed, whole = "packed", slice(1, 2)
    return merge_norm(HALF, 2, 12, 16, 2, True, packed, packed, HALF, FULL, FULL, 1e-5, whole)


@op(
    **KEYS, queries=(12, 5), q=LAYOUT, k=LAYOUT, v=LAYOUT, ahead=(2, 0, 3), shared=(1, 2), ahead_k=LAYOUT,
    ahead_v=LAYOUT, sized=(True, False), scale=(None, 0.5), grad=LAYOUT,
)  # fmt: skip
def attention(
    dtype, n, heads, tokens, channels, queries, q, k, v, ahead, shared, ahead_k, ahead_v, sized, scale
) -> tuple:
    n *= 2  # items in pairs, which may share a prefix
    given = [laid(how, n, heads, t, channels, dtype=dtype) for how, t in ((q, queries), (k, tokens), (v, tokens))]
    prefix = [laid(how, n // shared, heads, ahead, channels, dtype=dtype) for how in (ahead_k, ahead_v)]
    size = torch.ones(n, tokens) if sized else None
    return (stk.attention(*given, size, *(prefix if ahead else (None, None)), scale),)


def cases() -> Iterator[tuple[str, dict]]:
    """Yield every op's arguments, each changed alone, and the usual ones before and after."""
    for name, (choices, _) in OPS.items():
        usual = {argument: values[0] for argument, values in choices.items()}
        for argument, values in choices.items():
            for value in (*values[1:], values[0]):
                yield name, {**usual, argument: value}


def form(value: object) -> object:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), list(value.stride())]
    return value if value is None or isinstance(value, (int, float, str)) else str(value)


def leaves_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the leaves that outputs were computed from."""
    waiting, leaves = [t.grad_fn for t in outputs], []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions if following is not None]
    return leaves


def main() -> None:
    no_gpu.install(results=False)
    from stoptome_kernels._backends.triton import launch
    from triton.runtime import driver

    seen: list = []

    def note(self, x, y, z, stream, function, metadata, more, enter, leave, *arguments):
        seen.append([id(self), x, y, z, *map(form, arguments)])  # each compiled kernel has a launcher of its own

    driver.active.launcher_cls.__call__ = note

    def launched(name: str, arguments: dict) -> list:
        """Return what an op and its gradient give to the driver."""
        seen.clear()
        torch.manual_seed(0)
        given = dict(arguments)
        layout = given.pop("grad", None)
        out = OPS[name][1](**given)
        if layout:
            grads = [laid(layout, *t.shape, dtype=t.dtype).detach() for t in out]
            torch.autograd.grad(out, leaves_of(out), grads, allow_unused=True)
        return list(seen)

    found, prepares = [], launch._PREPARES
    for name, arguments in cases():
        prepared = launched(name, arguments)
        launch._PREPARES, ready = False, dict(launch._READY)
        launch.forget()
        plain = launched(name, arguments)
        launch._PREPARES = prepares
        launch._READY.update(ready)
        found.append([name, {key: str(value) for key, value in arguments.items()}, prepared, plain])
    json.dump({"found": found, "prepares": prepares, "keys": len(launch._READY)}, sys.stdout)


if __name__ == "__main__":
    main()
